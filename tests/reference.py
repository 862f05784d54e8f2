"""MMM4Rec in plain PyTorch: the oracle of the model's tests and the implementation that a benchmark times it against.

It reads the parameters of an `MMM4Rec` (gradients land in their `.grad`) and shares no computation with it. Every history
has all T positions and every position is computed. It groups no lengths, samples no candidates (no in-batch loss), masks no
seen items, draws dropout in another order than the model, is one process, and knows no quirk `summed_accumulation`.

Dimensions: B examples, T = max_len, I items (row 0 is padding), D width, E = expand * D inner, H heads, P head width
(E = H * P), G groups, N state, K kernel of the convolutions, F features of an item, C channels of a convolution.
A time signal `tau` is [B, H, T], or None where the model reads no time. The scan's B and C are called keys and queries here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm4rec.data.batches import TimeView
from mmm4rec.data.domain import Domain
from mmm4rec.data.features import ItemFeatures, Modality
from mmm4rec.models.mmm4rec import MMM4Rec

Streams = dict[Modality, Tensor]  # [B, T, D] each, text first
Taus = dict[Modality, Tensor | None]  # [B, H, T] each, or None without time

LOG_GAP_UNIT = 10.0
ACTIVATIONS = {"silu": F.silu, "hardswish": F.hardswish}
ITEMS_ONLY = TimeView()


@dataclass(frozen=True)
class Padded:
    """Examples in the order they were asked for."""

    items: Tensor  # [B, T] int64, right-padded with 0
    lengths: Tensor  # [B] int64, 1..T
    gap_seconds: Tensor | None  # [B, T] float32: gap to the position before, 0 where not timed
    timed: Tensor  # [B, T] bool: the position's gap may be read
    targets: Tensor  # [B] int64

    def to(self, device: torch.device) -> Padded:
        return Padded(*(None if part is None else part.to(device) for part in vars(self).values()))


def pad(
    domain: Domain, users: np.ndarray, ends: np.ndarray, *, max_len: int, time: bool, view: TimeView = ITEMS_ONLY, with_targets: bool = True
) -> Padded:
    """The examples (users[k], ends[k]): inputs are the last max_len items before `end`; without targets these are 0."""
    view = view if with_targets else replace(view, label_time=False)
    lengths = np.minimum(ends, max_len)
    first = domain.offsets[users] + ends - lengths  # [B] row of the first input
    items = _lay_out(domain.items, first, lengths, max_len)
    gaps, timed = None, np.arange(max_len) < lengths[:, None]
    if time and domain.timestamps is not None:
        gaps, timed = view.gaps(_lay_out(domain.timestamps, first, lengths + view.label_time, max_len), lengths)
    targets = domain.items[domain.offsets[users] + ends] if with_targets else np.zeros(len(users))
    return Padded(
        items=torch.from_numpy(items.astype(np.int64)),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        gap_seconds=None if gaps is None else torch.from_numpy(gaps.astype(np.float32)),
        timed=torch.from_numpy(timed),
        targets=torch.from_numpy(targets.astype(np.int64)),
    )


def _lay_out(values: np.ndarray, first: np.ndarray, counts: np.ndarray, max_len: int) -> np.ndarray:
    """values[first[k]:][:counts[k]] as row k of [B, T], zeros behind."""
    positions = np.arange(max_len)
    real = positions < counts[:, None]  # [B, T]
    return np.where(real, values[np.where(real, first[:, None] + positions, 0)], 0)


def items(model: MMM4Rec, features: ItemFeatures) -> tuple[dict[Modality, Tensor], Tensor]:
    """The whole catalogue: inputs [I + 1, D] a stream, of which histories are made, and candidates [I + 1, D]."""
    inputs = {stream: _item_inputs(model, stream, features) for stream in model.config.streams}
    unit = [F.normalize(vectors, dim=-1, eps=1e-12) for vectors in inputs.values()]
    if len(unit) == 1:
        return inputs, unit[0]
    if model.fusion is None:
        return inputs, unit[0] + unit[1]
    weights = model.fusion.softmax(-1)  # [2] or [I + 1, 2], text first
    return inputs, weights[..., :1] * unit[0] + weights[..., 1:] * unit[1]


def _item_inputs(model: MMM4Rec, stream: Modality, features: ItemFeatures) -> Tensor:
    vectors = model.missing[stream].expand(features.n_items + 1, -1)  # [I + 1, D]
    if stream in features.vectors and stream in model.adapters:
        present = features.present[stream].clone()  # [I + 1]
        if model.config.quirks.padding_class:
            present[0] = True
        vectors = torch.where(present[:, None], _linear(model.adapters[stream], features.vectors[stream]), vectors)
    return vectors + model.ids[stream] if model.config.ids else vectors


def users(model: MMM4Rec, padded: Padded, inputs: dict[Modality, Tensor]) -> Tensor:
    """User vectors [B, D]: the image stream (or the only one) at each example's last item."""
    streams, taus = {}, {}
    for name, table in inputs.items():
        embedded = F.embedding(padded.items, table)  # [B, T, D]
        streams[name] = _layer_norm(model, model.input_norm[name], _dropout(model, embedded))
        taus[name] = _time_input(model, padded, embedded.dtype) if model.config.time else None
    for layer in model.layers:
        streams, taus = _layer(model, layer, streams, taus)
    last = streams[model.config.streams[-1]]
    return last[torch.arange(len(last), device=last.device), padded.lengths - 1]


def _time_input(model: MMM4Rec, padded: Padded, dtype: torch.dtype) -> Tensor:
    """The first time signal [B, H, T]."""
    assert model.time_input is not None
    assert padded.gap_seconds is not None
    config, norm, timed = model.config, model.time_input.norm, padded.timed
    gaps = padded.gap_seconds.to(dtype) * timed  # [B, T]
    if config.quirks.raw_gap_dropout:
        gaps = _dropout(model, gaps)
    if config.time_encoding == "layer_norm":
        tau = _layer_norm(model, norm, gaps)
    elif config.time_encoding == "log":
        tau = (gaps.sign() * gaps.abs().log1p() / LOG_GAP_UNIT * norm.weight + norm.bias) * timed
    else:
        count = timed.sum(1, keepdim=True)
        centred = (gaps - (gaps * timed).sum(1, keepdim=True) / count) * timed
        variance = centred.square().sum(1, keepdim=True) / count
        tau = (centred / (variance + config.norm_eps).sqrt() * norm.weight + norm.bias) * timed
    return tau[:, None].expand(-1, config.heads, -1)


def _layer(model: MMM4Rec, layer: nn.Module, streams: Streams, taus: Taus) -> tuple[Streams, Taus]:
    """Each stream through the shared time-aware SSD block and its own feed-forward; text, which comes first, joins image between."""
    hidden, next_taus = {}, {}
    for name, stream in streams.items():
        mixed, next_taus[name] = _time_ssd(model, layer.ssd, stream, taus[name])
        hidden[name] = _layer_norm(model, layer.norm[name], _dropout(model, mixed) + stream)
        if name == "image" and "text" in hidden:
            hidden[name] = _join(model, layer, hidden[name], hidden["text"], next_taus)
        hidden[name] = _feed_forward(model, layer.ffn[name], hidden[name])
    return hidden, next_taus


def _join(model: MMM4Rec, layer: nn.Module, image: Tensor, text: Tensor, taus: Taus) -> Tensor:
    if model.config.cross == "add":
        return _layer_norm(model, layer.cross_norm, image + text)
    tau = None
    if model.config.time:
        tau = _fourier_filter(model, layer.filter, taus["image"], taus["text"]) if model.config.filter else taus["image"] + taus["text"]
    crossed = _cross_ssd(model, layer.cross, image, text, tau)
    return _layer_norm(model, layer.cross_norm, _dropout(model, crossed) + image + text)


def _time_ssd(model: MMM4Rec, block: nn.Module, u: Tensor, tau: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """u [B, T, D] -> [B, T, D] and the next layer's tau."""
    E, GN, H = model.config.ssd.inner, model.config.ssd.groups * model.config.state, model.config.heads
    gate, mixed, step = _linear(block.proj, u).split((E, E + 2 * GN, H), dim=-1)
    values, keys, queries = F.silu(_causal_conv(block.conv, mixed)).split((E, GN, GN), dim=-1)
    step, factor = _timed_step(model, block, step, tau, F.silu)
    if tau is not None and factor is not None:
        keep = torch.sigmoid(_linear(block.time_gate, _dropout(model, tau)))  # [B, H, 1 or T]
        tau = _layer_norm(model, block.time_norm, keep * tau + (1 - keep) * factor.transpose(1, 2))
    return _scan_block(model, block.scan, values, keys, queries, step, gate), tau


def _cross_ssd(model: MMM4Rec, block: nn.Module, query: Tensor, context: Tensor, tau: Tensor | None) -> Tensor:
    """query [B, T, D] reads what context [B, T, D] wrote -> [B, T, D]."""
    E, GN, H = model.config.ssd.inner, model.config.ssd.groups * model.config.state, model.config.heads
    activation = ACTIVATIONS[model.config.cross_activation]
    mixed, step = _linear(block.context_proj, context).split((E + GN, H), dim=-1)
    values, keys = activation(_causal_conv(block.context_conv, mixed)).split((E, GN), dim=-1)
    queries = activation(_causal_conv(block.query_conv, _linear(block.query_proj, query)))
    step, _ = _timed_step(model, block, step, tau, activation)
    return _scan_block(model, block.scan, values, keys, queries, step, _linear(block.gate_proj, query + context))


def _timed_step(
    model: MMM4Rec, block: nn.Module, step: Tensor, tau: Tensor | None, activation: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """step [B, T, H] before softplus -> the steps that tau shifts or scales, and the factors [B, T, H] of the scaled."""
    if tau is None:
        return step, None
    if model.config.time_step == "shift":
        return step + tau.transpose(1, 2) * block.time_shift.weight, None
    part = block.time_scale
    scale = F.tanhshrink(_linear(part.second, F.silu(_linear(part.first, _dropout(model, tau)))))  # [B, H, T]
    signal = activation(_causal_conv(part.conv_first, (tau * scale).transpose(1, 2)))
    factor = activation(_causal_conv(part.conv_second, signal))
    return step * factor, factor


def _scan_block(model: MMM4Rec, part: nn.Module, values: Tensor, keys: Tensor, queries: Tensor, step: Tensor, gate: Tensor) -> Tensor:
    """values and gate [B, T, E], keys and queries [B, T, G * N], step [B, T, H] -> [B, T, D]."""
    config = model.config
    H, G = config.heads, config.ssd.groups
    values = values.unflatten(-1, (H, -1))  # [B, T, H, P]
    keys, queries = (x.unflatten(-1, (G, -1)) for x in (keys, queries))  # [B, T, G, N]
    delta = F.softplus(step + part.step_bias)  # [B, T, H]
    y = _scan(values, keys, queries, delta, -part.log_a.exp())
    skipped = values * delta[..., None] if config.quirks.scaled_skip else values
    y = (y + part.skip[:, None] * skipped).flatten(-2) * F.silu(gate)  # [B, T, E]
    return _linear(part.out, F.rms_norm(y, y.shape[-1:], part.norm_weight, config.norm_eps))


def _scan(values: Tensor, keys: Tensor, queries: Tensor, delta: Tensor, a: Tensor) -> Tensor:
    """State-space duality as masked attention, quadratic in T however long; delta [B, T, H], a [H] -> [B, T, H, P]."""
    T, H, G = *delta.shape[1:], keys.shape[2]
    log_decay = (delta * a).cumsum(1).transpose(1, 2)  # [B, H, T]
    between = log_decay[..., :, None] - log_decay[..., None, :]  # [B, H, T, T], to row from column
    future = torch.ones(T, T, dtype=torch.bool, device=values.device).triu(1)
    decay = between.masked_fill(future, -torch.inf).exp()
    affinity = torch.einsum("btgn,bsgn->bgts", queries, keys).repeat_interleave(H // G, dim=1)  # [B, H, T, T]
    return torch.einsum("bhts,bshp->bthp", decay * affinity, values * delta[..., None])


def _fourier_filter(model: MMM4Rec, part: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    """Two time signals [B, H, T] -> one, of their lowest frequencies."""
    size = model.config.filter_size or model.config.frequencies
    image, text = (torch.fft.rfft(tau, norm="ortho")[..., :size] for tau in (image, text))
    joined = _complex_linear(part.joint, image * _complex_linear(part.image, image) + text * _complex_linear(part.text, text))
    return torch.fft.irfft(joined, n=model.config.max_len, norm="ortho")


def _complex_linear(part: nn.Module, x: Tensor) -> Tensor:
    real = _linear(part.real, x.real) - _linear(part.imag, x.imag)
    imag = _linear(part.real, x.imag) + _linear(part.imag, x.real)
    return torch.complex(real, imag)


def _feed_forward(model: MMM4Rec, part: nn.Module, x: Tensor) -> Tensor:
    inner = _dropout(model, F.hardswish(_linear(part.first, x)))
    return _layer_norm(model, part.norm, _dropout(model, _linear(part.second, inner)) + x)


def _causal_conv(part: nn.Module, x: Tensor) -> Tensor:
    """Depthwise over time: x [B, T, C] -> [B, T, C], zeros before the first position."""
    channels, kernel = part.weight.shape
    x = F.pad(x.transpose(1, 2), (kernel - 1, 0))  # [B, C, K - 1 + T]
    return F.conv1d(x, part.weight[:, None], part.bias, groups=channels).transpose(1, 2)


def _linear(part: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, part.weight, part.bias)


def _layer_norm(model: MMM4Rec, part: nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], part.weight, part.bias, model.config.norm_eps)


def _dropout(model: MMM4Rec, x: Tensor) -> Tensor:
    return F.dropout(x, model.config.dropout, training=model.training)


def scores(model: MMM4Rec, users: Tensor, candidates: Tensor) -> Tensor:
    """Logits [B, I + 1] of every item for every user."""
    return users @ candidates.T / model.config.temperature


def loss_sum(model: MMM4Rec, scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over items 1..I, with the quirk `padding_class` over 0..I, summed over the examples."""
    if model.config.quirks.padding_class:
        return F.cross_entropy(scores, targets, reduction="sum")
    return F.cross_entropy(scores[:, 1:], targets - 1, reduction="sum")


def optimizer_step(model: MMM4Rec, features: ItemFeatures, optimizer: torch.optim.Optimizer, batches: list[Padded]) -> float:
    """One step on the mean gradient over the examples of all batches; returns their summed loss."""
    optimizer.zero_grad()
    examples = sum(len(padded.targets) for padded in batches)
    summed_loss = 0.0
    for padded in batches:
        inputs, candidates = items(model, features)
        loss = loss_sum(model, scores(model, users(model, padded, inputs), candidates), padded.targets)
        (loss / examples).backward()
        summed_loss += loss.item()
    optimizer.step()
    return summed_loss


@torch.no_grad()
def ranks(model: MMM4Rec, features: ItemFeatures, padded: Padded) -> Tensor:
    """Ranks [B] of the targets among items 1..I: 1 + those that score higher + half of the ties. Call it in eval mode."""
    inputs, candidates = items(model, features)
    found = scores(model, users(model, padded, inputs), candidates)  # [B, I + 1]
    target = found.gather(1, padded.targets[:, None])  # [B, 1]
    higher = (found[:, 1:] > target).sum(1)
    ties = (found[:, 1:] == target).sum(1) - 1
    return 1 + higher + ties.double() / 2
