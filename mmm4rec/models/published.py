"""The authors' released checkpoints, in and out (github.com/AlwaysFHao/MMM4Rec, commit e0bc248).

The release lists the SSD block that both streams share twice, stores a convolution's weight as
[C, 1, K], names the Fourier channels after the stream that they do not act on, and keeps the feature
tables, a zero row before the first item, among the weights; its files on disk leave those tables out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmm4rec.data.batches import Batch, TimeView, pack
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
            the first item [I + 1, F] (where no tensor of the checkpoint says I, a zero first row is taken for padding);
            taken from the state dict where it has them and they are not given.
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
        model = MMM4Rec(config, feature_dimensions=dimensions, n_items=_n_items(weights)).eval()
    model.to(_tensor(weights, "text_adapter.0.weight").dtype)
    model.features = catalogue
    _load(model, weights, strict=strict)
    return model


def to_published(model: MMM4Rec) -> dict[str, Tensor]:
    """The model's weights as the release reads them; its features too where the model carries them.

    Raises BadInput where the release has no such model: its scores would be others. What its files do not say
    (temperature, activation, and quirks that concern its training) is not written.
    """
    config = model.config
    differences = {
        "one modality": config.modalities != "both" or set(model.adapters) != set(CHANNELS),
        "no Cross-SSD": config.cross != "ssd",
        "an unscaled skip (quirks.scaled_skip)": not config.quirks.scaled_skip,
        "another epsilon (quirks.tiny_epsilon)": not config.quirks.tiny_epsilon,
        "groups other than 1 and one a head": config.ssd.groups not in (1, config.heads),
        "another time input (time_encoding, time_step)": config.time
        and (config.time_encoding, config.time_step) != ("layer_norm", "scale"),
        "no Fourier filter or a smaller one": config.time and not (config.has_filter and config.filter_size in (None, config.frequencies)),
    }
    if found := [name for name, differs in differences.items() if differs]:
        raise BadInput(f"the release has no model with {'; '.join(found)}.", remedy="Train what ModelConfig.published() describes.")
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
    quirks, ids, sizes = model.config.quirks, np.asarray(items), np.asarray(lengths)
    gaps, timed = TimeView(quirks.label_time, quirks.zero_stamps).gaps(np.asarray(timestamps), sizes)
    windows, packing = pack(ids[np.arange(ids.shape[1]) < sizes[:, None]], sizes)
    batch = Batch(
        items=windows,
        packing=packing,
        gap_seconds=torch.from_numpy(gaps).to(weight.dtype),
        timed=torch.from_numpy(timed),
        targets=torch.zeros(len(ids), dtype=torch.long),
        users=np.arange(len(ids)),
        ends=sizes,
    ).to(weight.device)
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
    except Exception as error:  # of many kinds, torch.load's above all; all mean that this is no file of tensors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(
            f"cannot be read as plain tensors ({reason}).", file=file, remedy="Give a .safetensors, .npy or torch file of tensors."
        ) from error


def _config(weights: Mapping[str, Tensor], n_groups: int | None, activation: Activation, max_len: int, temperature: float) -> ModelConfig:
    block, layers = "encoder_ssd_layers.0.", [re.match(r"encoder_ssd_layers\.(\d+)\.", name) for name in weights]
    D, heads = _tensor(weights, "text_adapter.0.weight").shape[0], len(_tensor(weights, block + "ssd.dt_bias"))
    E = _tensor(weights, block + "ssd.out_proj.weight").shape[1]
    channels, _, kernel = _tensor(weights, block + "ssd.conv1d_1.weight").shape  # E + 2 * G * N
    groups = heads if n_groups is None else n_groups
    if E % D or groups < 1 or heads % groups or E % heads or (channels - E) % (2 * groups):
        rule = f"width {D}, inner width {E}, {heads} heads, {groups} groups and {channels} convolved channels do not fit together."
        raise BadInput(rule, remedy="Check n_groups; the release's is 8 or 1.")
    time = block + "ssd.mlp4time_scale.1.weight" in weights
    gate = weights.get(block + "ssd.time_gate_residual.1.weight")
    fusion = weights.get("fusion_factor", torch.ones(())).dim()
    if temperature <= 0 or max_len < 1:
        raise BadInput(f"temperature is {temperature} and max_len {max_len}; both must be above 0.", remedy="Leave them at .8 and 20.")
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
    if absent := [stream for stream in CHANNELS if stream not in given]:
        raise BadInput(f"there are no {absent[0]} features, which the published model reads.", remedy="Give the features of both.")
    n_items = _n_items(weights)
    padded: dict[Modality, Tensor] = {}
    for stream, table in given.items():
        expected = _tensor(weights, f"{CHANNELS[stream]}_adapter.0.weight").shape[1]
        if table.dim() != 2 or table.shape[1] != expected:
            rule = f"{stream} features are {list(table.shape)}; the checkpoint reads {expected} numbers an item."
            raise BadInput(rule, remedy="Give features of the encoder that it was trained with.")
        has_padding = len(table) == n_items + 1 if n_items is not None else not table[:1].any()
        padded[stream] = table if has_padding else torch.cat([torch.zeros_like(table[:1]), table])
        n_items = len(padded[stream]) - 1 if n_items is None else n_items
        if len(padded[stream]) != n_items + 1:
            rule = f"{stream} features are of {len(padded[stream]) - 1:,} items, the checkpoint or the other features of {n_items:,}."
            raise BadInput(rule, remedy="Give the features of the items that the checkpoint was trained on.")
    assert n_items is not None
    return ItemFeatures(n_items, padded, {stream: torch.arange(n_items + 1) > 0 for stream in padded}, {})


def _n_items(weights: Mapping[str, Tensor]) -> int | None:
    """I, where a tensor has a row an item."""
    tables = (weights.get(name, torch.ones(())) for name in ("text_item_embedding_bias", "fusion_factor"))
    return next((len(table) - 1 for table in tables if table.dim() == 2), None)


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
                f"the checkpoint does not fit the published model ({told}).",
                remedy="Allow it with strict=False (--allow-differences), if it is meant.",
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
