"""The released checkpoints' names, and ours.

The release lists the SSD block that both streams share twice, stores a convolution's weight as
[C, 1, K], and names the Fourier channels after the stream that they do not act on.
"""

from __future__ import annotations

import re

from torch import Tensor

_RULES = (
    (r"^decoder_ssd_layers\.(\d+)\.ssd\.", r"layers.\1.ssd."),
    (r"^encoder_ssd_layers\.(\d+)\.ssd\.", r"layers.\1.ssd."),
    (r"^encoder_ssd_layers\.(\d+)\.layer_norm\.", r"layers.\1.norm.text."),
    (r"^decoder_ssd_layers\.(\d+)\.layer_norm\.", r"layers.\1.norm.image."),
    (r"^encoder_ssd_layers\.(\d+)\.ffn\.", r"layers.\1.ffn.text."),
    (r"^decoder_ssd_layers\.(\d+)\.ffn\.", r"layers.\1.ffn.image."),
    (r"^decoder_ssd_layers\.(\d+)\.co_ssd\.", r"layers.\1.cross."),
    (r"^decoder_ssd_layers\.(\d+)\.co_layer_norm\.", r"layers.\1.cross_norm."),
    (r"^decoder_ssd_layers\.(\d+)\.text_complex_weight\.0\.", r"layers.\1.filter.image."),
    (r"^decoder_ssd_layers\.(\d+)\.vision_complex_weight\.0\.", r"layers.\1.filter.text."),
    (r"^decoder_ssd_layers\.(\d+)\.co_complex_weight\.0\.", r"layers.\1.filter.joint."),
    (r"(ffn\.\w+)\.fc1\.", r"\1.first."),
    (r"(ffn\.\w+)\.fc2\.", r"\1.second."),
    (r"(ffn\.\w+)\.layer_norm\.", r"\1.norm."),
    (r"\.dt_bias$", ".scan.step_bias"),
    (r"\.A_log$", ".scan.log_a"),
    (r"\.D$", ".scan.skip"),
    (r"(ssd|cross)\.norm\.weight$", r"\1.scan.norm_weight"),
    (r"\.out_proj\.", ".scan.out."),
    (r"\.in_proj\.", ".proj."),
    (r"\.conv1d_1\.", ".conv."),
    (r"\.conv1d4time_1\.", ".time_scale.conv_first."),
    (r"\.conv1d4time_2\.", ".time_scale.conv_second."),
    (r"\.mlp4time_scale\.1\.", ".time_scale.first."),
    (r"\.mlp4time_scale\.3\.", ".time_scale.second."),
    (r"\.time_gate_residual\.1\.", ".time_gate."),
    (r"\.time_layer_norm\.", ".time_norm."),
    (r"\.u_in_proj\.", ".context_proj."),
    (r"\.z_in_proj\.", ".gate_proj."),
    (r"\.q_in_proj\.", ".query_proj."),
    (r"\.u_conv1d\.", ".context_conv."),
    (r"\.q_conv1d\.", ".query_conv."),
    (r"^text_adapter\.0\.", "adapters.text."),
    (r"^vision_adapter\.0\.", "adapters.image."),
    (r"^text_in_layer_norm\.", "input_norm.text."),
    (r"^vision_in_layer_norm\.", "input_norm.image."),
    (r"^text_item_embedding_bias$", "ids.text"),
    (r"^vision_item_embedding_bias$", "ids.image"),
    (r"^layer_norm_time\.", "time_input.norm."),
    (r"^fusion_factor$", "fusion"),
)


def our_name(name: str) -> str:
    """Our name of a parameter of the release."""
    for pattern, ours in _RULES:
        name = re.sub(pattern, ours, name)
    return name


def our_weights(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published parameters under our names and shapes."""
    return {our_name(name): weight.squeeze(1) if "conv" in name and weight.dim() == 3 else weight for name, weight in published.items()}
