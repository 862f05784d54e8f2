"""The authors' released checkpoints, in and out (github.com/AlwaysFHao/MMM4Rec, commit e0bc248).

The release lists the SSD block that both streams share twice, stores a convolution's weight as
[C, 1, K], names the Fourier channels after the stream that they do not act on, and keeps the feature
tables, a zero row before the first item, among the weights; its files on disk leave those tables out.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmm4rec.data.batches import Batch, Group, TimeView
from mmm4rec.data.features import ItemFeatures, Modality
from mmm4rec.errors import BadInput
from mmm4rec.models.blocks import Activation
from mmm4rec.models.mmm4rec import MMM4Rec, ModelConfig

log = logging.getLogger(__name__)

STREAMS: dict[Modality, str] = {"text": "encoder", "image": "decoder"}  # our name, the release's
CHANNELS: dict[Modality, str] = {"text": "text", "image": "vision"}
FEATURE_NAMES: dict[str, Modality] = {"text": "text", "image": "image", "text_embedding": "text", "vision_embedding": "image"}
Pair = tuple[str, str]  # a parameter's name in the release, and ours


def from_published(
    state_dict: Mapping[str, Tensor],
    *,
    features: Mapping[str, Tensor] | None = None,
    n_groups: int | None = None,
    activation: Activation = "silu",
    max_len: int = 20,
    temperature: float = 0.8,
    strict: bool = True,
) -> MMM4Rec:
    """The released model of a checkpoint, in evaluation mode, with sizes and switches read off its tensors.

    Args:
        state_dict: published names to tensors, or the mapping that the release saves, with them under "model".
        features: tables `text` and `image` (or under the release's names of them), [I, F] or with a zero row before
            the first item [I + 1, F]; taken from the state dict where it has them and they are not given.
        n_groups: G; the tensors fix only G * N. None: one group a head.
        activation: of Cross-SSD; the release used hardswish where causal_conv1d was not installed.
        max_len: T, where the model has no time modules that show it.
        temperature: of the scores; no tensor shows it.
        strict: raise on missing and left-over tensors; else name them in a warning and keep the initial
            values of the missing ones.
    The vectors for missing features, which the release does not have, are drawn anew (always the same).
    Raises BadInput where tensors are missing, left over, or of sizes that do not fit together.
    """
    weights = dict(state_dict.get("model", state_dict))
    tables: dict[Modality, Tensor | None] = {stream: weights.pop(f"{channel}_embedding", None) for stream, channel in CHANNELS.items()}
    for name, table in (features or {}).items():
        if name not in FEATURE_NAMES:
            raise BadInput(f"features name '{name}'.", remedy="Name them text and image.")
        tables[FEATURE_NAMES[name]] = torch.as_tensor(table)
    config = _config(weights, n_groups, activation, max_len, temperature)
    catalogue = _features(tables, weights)
    dimensions: dict[Modality, int] = {
        stream: _tensor(weights, f"{channel}_adapter.0.weight").shape[1] for stream, channel in CHANNELS.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MMM4Rec(config, feature_dimensions=dimensions, n_items=_n_items(weights, catalogue)).eval()
    model.to(_tensor(weights, "text_adapter.0.weight").dtype)
    model.features = catalogue
    _load(model, weights, strict=strict)
    return model


def to_published(model: MMM4Rec) -> dict[str, Tensor]:
    """The model's weights as the release reads them; its features too where the model carries them.

    Raises BadInput where the release has no such model: one modality, no Cross-SSD, no filter or a smaller one,
    the time path of this project, or features that are missing.
    """
    config = model.config
    if config.modalities != "both" or config.cross != "ssd":
        raise BadInput("the release has no model without Cross-SSD or one modality.", remedy="Export a model of both modalities.")
    if config.time and (config.time_step != "scale" or not config.has_filter or config.filter_size not in (None, config.frequencies)):
        rule = "the release scales its steps and filters all frequencies; this model does not."
        raise BadInput(rule, remedy="Train with model.time_step=scale and the full Fourier filter.")
    own = {name: value.detach() for name, value in model.named_parameters()}
    result = {published: own[ours].unsqueeze(1) if _is_conv(published) else own[ours] for published, ours in _pairs(config)}
    if config.fusion == "static":
        result["fusion_factor"] = own["adapters.text.weight"].new_ones(())
    for stream, channel in CHANNELS.items():
        if model.features is not None and stream in model.features.vectors:
            result[f"{channel}_embedding"] = model.features.vectors[stream]
    return result


def published_scores(model: MMM4Rec, items: Tensor, lengths: Tensor, timestamps: Tensor) -> tuple[Tensor, Tensor]:
    """User vectors [B, D] and scores [B, I + 1] of right-padded arrays laid out as the release does.

    Args:
        items [B, T] int, 0 is padding; lengths [B] int, 1..T; timestamps [B, T] int seconds: the items', then
            the target's where there is room, then 0. What the model sees of the last two its quirks decide.
    Column 0 of the scores is the padding class. Raises BadInput where the model carries no features.
    """
    if model.features is None:
        raise BadInput("the model carries no features to score with.", remedy="Give from_published its `features`.")
    weight = next(model.parameters())
    quirks, ids, sizes = model.config.quirks, torch.as_tensor(items), np.asarray(lengths)
    gaps, timed = TimeView(quirks.label_time, quirks.zero_stamps).gaps(np.asarray(timestamps), sizes)
    group = Group(ids, torch.as_tensor(lengths), torch.from_numpy(gaps).to(weight.dtype), torch.from_numpy(timed))
    batch = Batch((group,), torch.zeros(len(ids), dtype=torch.long), np.arange(len(ids)), sizes).to(weight.device)
    catalogue = model.items(model.features.to(weight.device, weight.dtype))
    users = model.users(batch, catalogue)
    return users, model.scores(users, catalogue)


def read_published(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a released checkpoint (.safetensors, or what torch.save wrote), under its names.

    Nothing in the file is executed. Raises BadInput where it cannot be read so.
    """
    content = read_tensors(file)
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise BadInput("holds no tensors under names.", file=file, remedy="Give a checkpoint that the release saved.")
    return weights


def read_tensors(file: str | Path) -> object:
    """What a .safetensors, .npy or torch file holds, without executing anything in it. Raises BadInput."""
    try:
        if Path(file).suffix == ".safetensors":
            return load_file(file)
        if Path(file).suffix == ".npy":
            return torch.from_numpy(np.load(file, allow_pickle=False))
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(
            f"cannot be read as plain tensors ({reason}).", file=file, remedy="Give a file that torch.save wrote of tensors."
        ) from error


def _config(weights: Mapping[str, Tensor], n_groups: int | None, activation: Activation, max_len: int, temperature: float) -> ModelConfig:
    block, layers = "encoder_ssd_layers.0.", [re.match(r"encoder_ssd_layers\.(\d+)\.", name) for name in weights]
    D, heads = _tensor(weights, "text_adapter.0.weight").shape[0], len(_tensor(weights, block + "ssd.dt_bias"))
    E = _tensor(weights, block + "ssd.out_proj.weight").shape[1]
    channels, _, kernel = _tensor(weights, block + "ssd.conv1d_1.weight").shape  # E + 2 * G * N
    groups = n_groups or heads
    if E % D or E % heads or (channels - E) % (2 * groups):
        rule = f"width {D}, inner width {E}, {heads} heads, {groups} groups and {channels} convolved channels do not fit together."
        raise BadInput(rule, remedy="Check n_groups; the release's is 8 or 1.")
    time = block + "ssd.mlp4time_scale.1.weight" in weights
    gate = weights.get(block + "ssd.time_gate_residual.1.weight")
    fusion = weights.get("fusion_factor", torch.ones(())).dim()
    return ModelConfig.published(
        width=D,
        layers=1 + max(int(match[1]) for match in layers if match),
        ffn_width=_tensor(weights, block + "ffn.fc1.weight").shape[0],
        expand=E // D,
        head_width=E // heads,
        state=(channels - E) // (2 * groups),
        groups=groups,
        conv_width=kernel,
        max_len=len(_tensor(weights, "layer_norm_time.weight")) if time else max_len,
        ids="text_item_embedding_bias" in weights,
        time=time,
        time_gate="position" if gate is not None and len(gate) > 1 else "head",
        cross_activation=activation,
        fusion=("static", "dynamic_shared", "dynamic_instance")[fusion],
        temperature=temperature,
    )


def _features(tables: Mapping[Modality, Tensor | None], weights: Mapping[str, Tensor]) -> ItemFeatures | None:
    given = {stream: table for stream, table in tables.items() if table is not None}
    if not given:
        return None
    padded: dict[Modality, Tensor] = {
        stream: table if not table[:1].any() else torch.cat([torch.zeros_like(table[:1]), table]) for stream, table in given.items()
    }
    rows = {f"{stream} features": len(table) for stream, table in padded.items()}
    rows |= {name: len(weights[name]) for name in ("text_item_embedding_bias", "vision_item_embedding_bias") if name in weights}
    if len(set(rows.values())) > 1:
        told = ", ".join(f"{name} {count - 1:,}" for name, count in rows.items())
        raise BadInput(f"numbers of items differ: {told}.", remedy="Give the features of the items that the checkpoint was trained on.")
    for stream, table in padded.items():
        expected = _tensor(weights, f"{CHANNELS[stream]}_adapter.0.weight").shape[1]
        if table.dim() != 2 or table.shape[1] != expected:
            rule = f"{stream} features are {list(table.shape)}; the checkpoint reads {expected} numbers an item."
            raise BadInput(rule, remedy="Give features of the encoder that it was trained with.")
    n_items = next(iter(rows.values())) - 1
    present = {stream: torch.arange(n_items + 1) > 0 for stream in padded}
    return ItemFeatures(n_items, padded, present, {})


def _n_items(weights: Mapping[str, Tensor], features: ItemFeatures | None) -> int | None:
    for name in ("text_item_embedding_bias", "fusion_factor"):
        if weights.get(name, torch.ones(())).dim() == 2:
            return len(weights[name]) - 1
    return None if features is None else features.n_items


@torch.no_grad()
def _load(model: MMM4Rec, weights: dict[str, Tensor], *, strict: bool) -> None:
    """Copy every tensor of the release into the model; the second listing of a shared block must equal the first."""
    own, pairs = dict(model.named_parameters()), dict(_pairs(model.config))
    expected = set(pairs) | ({"fusion_factor"} if model.config.fusion == "static" else set())
    missing, left_over = sorted(expected - set(weights)), sorted(set(weights) - expected)
    if missing or left_over:
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in (("missing", missing), ("left over", left_over)) if names)
        if strict:
            raise BadInput(
                f"the checkpoint does not fit the published model ({told}).", remedy="Allow it with strict=False, if it is meant."
            )
        log.warning("published checkpoint: %s", told)
    filled: dict[str, str] = {}
    for published, ours in pairs.items():
        if published not in weights:
            continue
        given = weights[published].squeeze(1) if _is_conv(published) else weights[published]
        if given.shape != own[ours].shape:
            rule = f"'{published}' is {list(weights[published].shape)}; with the sizes of the other tensors it would be another."
            raise BadInput(rule, remedy="Check n_groups; if it is right, the checkpoint is damaged.")
        if ours in filled and not torch.equal(own[ours], given.to(own[ours])):
            raise BadInput(
                f"'{published}' and '{filled[ours]}' are one tensor of the release and differ here.", remedy="The file is damaged."
            )
        own[ours].copy_(given)
        filled[ours] = published


def _tensor(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if not isinstance(weights.get(name), Tensor):
        raise BadInput(
            f"the checkpoint has no tensor '{name}': it is none of the published model.", remedy="Give a checkpoint of the release."
        )
    return weights[name]


def _is_conv(published: str) -> bool:
    return "conv1d" in published and published.endswith(".weight")


def _pairs(config: ModelConfig) -> Iterator[Pair]:
    """The name in the release and ours of every parameter that the release has; shared ones come twice."""
    for stream, channel in CHANNELS.items():
        yield from _linear(f"{channel}_adapter.0", f"adapters.{stream}")
        yield from _linear(f"{channel}_in_layer_norm", f"input_norm.{stream}")
        if config.ids:
            yield f"{channel}_item_embedding_bias", f"ids.{stream}"
    if config.time:
        yield from _linear("layer_norm_time", "time_input.norm")
    if config.fusion != "static":
        yield "fusion_factor", "fusion"
    for i in range(config.layers):
        ours = f"layers.{i}"
        for stream, side in STREAMS.items():
            layer = f"{side}_ssd_layers.{i}"
            yield from _ssd(f"{layer}.ssd", f"{ours}.ssd", time=config.time)
            yield from _linear(f"{layer}.layer_norm", f"{ours}.norm.{stream}")
            for published, own in (("fc1", "first"), ("fc2", "second"), ("layer_norm", "norm")):
                yield from _linear(f"{layer}.ffn.{published}", f"{ours}.ffn.{stream}.{own}")
        yield from _cross(f"decoder_ssd_layers.{i}", ours, time=config.time)


def _ssd(published: str, ours: str, *, time: bool) -> Iterator[Pair]:
    yield from _scan(published, f"{ours}.scan")
    yield from _linear(f"{published}.in_proj", f"{ours}.proj")
    yield from _linear(f"{published}.conv1d_1", f"{ours}.conv")
    if time:
        yield from _time_scale(published, f"{ours}.time_scale")
        yield from _linear(f"{published}.time_gate_residual.1", f"{ours}.time_gate")
        yield from _linear(f"{published}.time_layer_norm", f"{ours}.time_norm")


def _cross(published: str, ours: str, *, time: bool) -> Iterator[Pair]:
    yield from _scan(f"{published}.co_ssd", f"{ours}.cross.scan")
    yield from _linear(f"{published}.co_layer_norm", f"{ours}.cross_norm")
    names = (("u_in_proj", "context_proj"), ("z_in_proj", "gate_proj"), ("q_in_proj", "query_proj"))
    for theirs, own in (*names, ("u_conv1d", "context_conv"), ("q_conv1d", "query_conv")):
        yield from _linear(f"{published}.co_ssd.{theirs}", f"{ours}.cross.{own}")
    if time:
        yield from _time_scale(f"{published}.co_ssd", f"{ours}.cross.time_scale")
        for channel, own in (("text", "image"), ("vision", "text"), ("co", "joint")):  # named after the other stream
            for part in ("real", "imag"):
                yield from _linear(f"{published}.{channel}_complex_weight.0.{part}", f"{ours}.filter.{own}.{part}")


def _scan(published: str, ours: str) -> Iterator[Pair]:
    for theirs, own in (("dt_bias", "step_bias"), ("A_log", "log_a"), ("D", "skip"), ("norm.weight", "norm_weight")):
        yield f"{published}.{theirs}", f"{ours}.{own}"
    yield from _linear(f"{published}.out_proj", f"{ours}.out")


def _time_scale(published: str, ours: str) -> Iterator[Pair]:
    names = (
        ("mlp4time_scale.1", "first"),
        ("mlp4time_scale.3", "second"),
        ("conv1d4time_1", "conv_first"),
        ("conv1d4time_2", "conv_second"),
    )
    for theirs, own in names:
        yield from _linear(f"{published}.{theirs}", f"{ours}.{own}")


def _linear(published: str, ours: str) -> Iterator[Pair]:
    yield f"{published}.weight", f"{ours}.weight"
    yield f"{published}.bias", f"{ours}.bias"
