"""MMM4Rec's ranking in plain NumPy, from a run's best.safetensors and a domain's files: no line of ours, none of torch.

The default model with dropout off: shared SSD block, Cross-SSD, Fourier filter of the time signals, steps that are moved by
the logarithm of the gaps. A history at a time, unpadded but for the filter, whose transform is over max_len.

Dimensions: L items of the history, I items (row 0 is padding), D width, E inner, H heads, P head width, G groups, N state, T max_len.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

EPSILON, GAP_UNIT = 1e-5, 10.0
Weights = dict[str, np.ndarray]
Sizes = dict[str, Any]


def ranks(checkpoint: Path, domain: Path, users: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The rank of each user's item at `ends` among all items of the domain; half of the ties count."""
    with safe_open(checkpoint, framework="numpy") as file:
        weights = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118
        sizes = json.loads(file.metadata()["mmm4rec"])["config"]["model"]
    offsets, items, times = (np.load(domain / f"{name}.npy") for name in ("offsets", "items", "timestamps"))
    streams = ["text", "image"] if sizes["modalities"] == "both" else [sizes["modalities"]]
    inputs = {stream: item_inputs(weights, sizes, domain, stream) for stream in streams}  # [I + 1, D]
    candidates = sum(unit(table) for table in inputs.values())
    found = []
    for user, end in zip(users, ends, strict=True):
        first = offsets[user] + max(0, end - sizes["max_len"])
        window = slice(first, offsets[user] + end)
        vector = user_vector(weights, sizes, items[window], times[window], inputs)
        scores, target = (candidates @ vector)[1:], items[offsets[user] + end] - 1
        found.append(1 + (scores > scores[target]).sum() + ((scores == scores[target]).sum() - 1) / 2)
    return np.array(found)


def item_inputs(w: Weights, sizes: Sizes, domain: Path, stream: str) -> np.ndarray:
    vectors, present = (np.load(domain / "features" / f"{stream}{suffix}.npy") for suffix in ("", ".present"))
    projected = np.where(present[:, None], linear(w, f"adapters.{stream}", vectors.astype(np.float64)), w[f"missing.{stream}"])
    table = np.concatenate([w[f"missing.{stream}"][None], projected])
    return table + w[f"ids.{stream}"] if sizes["ids"] else table


def user_vector(w: Weights, sizes: Sizes, items: np.ndarray, times: np.ndarray, inputs: dict[str, np.ndarray]) -> np.ndarray:
    streams = {name: norm(w, f"input_norm.{name}", table[items]) for name, table in inputs.items()}  # [L, D]
    heads = sizes["expand"] * sizes["width"] // sizes["head_width"]
    tau = None
    if sizes["time"]:
        gaps = np.concatenate([[0.0], np.diff(times.astype(np.float64))]).astype(np.float32)
        signal = np.sign(gaps) * np.log1p(np.abs(gaps)) / GAP_UNIT * w["time_input.norm.weight"][: len(gaps)]
        tau = np.repeat((signal + w["time_input.norm.bias"][: len(gaps)])[:, None], heads, axis=1)  # [L, H]
    for number in range(sizes["layers"]):
        layer, hidden = f"layers.{number}", {}
        for name, stream in streams.items():
            mixed = time_ssd(w, sizes, f"{layer}.ssd", stream, tau)
            hidden[name] = norm(w, f"{layer}.norm.{name}", mixed + stream)
            if name == "image" and "text" in hidden:
                hidden[name] = cross(w, sizes, layer, hidden[name], hidden["text"], tau)
            inner = linear(w, f"{layer}.ffn.{name}.first", hidden[name])
            inner = linear(w, f"{layer}.ffn.{name}.second", inner * np.clip(inner + 3, 0, 6) / 6)  # hardswish
            hidden[name] = norm(w, f"{layer}.ffn.{name}.norm", inner + hidden[name])
        streams = hidden
    return list(streams.values())[-1][-1]


def time_ssd(w: Weights, sizes: Sizes, block: str, stream: np.ndarray, tau: np.ndarray | None) -> np.ndarray:
    E, GN = inner(sizes), groups(sizes) * sizes["state"]
    gate, mixed, step = np.split(linear(w, f"{block}.proj", stream), [E, 2 * E + 2 * GN], axis=-1)
    values, keys, queries = np.split(silu(convolution(w, f"{block}.conv", mixed)), [E, E + GN], axis=-1)
    step = step if tau is None else step + tau * w[f"{block}.time_shift.weight"]
    return scan(w, sizes, f"{block}.scan", values, keys, queries, step, gate)


def cross(w: Weights, sizes: Sizes, layer: str, image: np.ndarray, text: np.ndarray, tau: np.ndarray | None) -> np.ndarray:
    E, GN, block = inner(sizes), groups(sizes) * sizes["state"], f"{layer}.cross"
    mixed, step = np.split(linear(w, f"{block}.context_proj", text), [E + GN], axis=-1)
    values, keys = np.split(silu(convolution(w, f"{block}.context_conv", mixed)), [E], axis=-1)
    queries = silu(convolution(w, f"{block}.query_conv", linear(w, f"{block}.query_proj", image)))
    if tau is not None:
        joined = fourier(w, sizes, f"{layer}.filter", tau) if sizes["filter"] else 2 * tau
        step = step + joined * w[f"{block}.time_shift.weight"]
    crossed = scan(w, sizes, f"{block}.scan", values, keys, queries, step, linear(w, f"{block}.gate_proj", image + text))
    return norm(w, f"{layer}.cross_norm", crossed + image + text)


def fourier(w: Weights, sizes: Sizes, part: str, tau: np.ndarray) -> np.ndarray:
    """Both time signals are the same here: the log of the gaps, which no layer changes."""
    length = sizes["max_len"]
    padded = np.zeros((length, tau.shape[1]))
    padded[: len(tau)] = tau
    size = sizes["filter_size"] or length // 2 + 1
    frequencies = np.fft.rfft(padded.T, norm="ortho")[:, :size]  # [H, size]

    def complex_linear(name: str, x: np.ndarray) -> np.ndarray:
        real = linear(w, f"{part}.{name}.real", x.real) - linear(w, f"{part}.{name}.imag", x.imag)
        return real + 1j * (linear(w, f"{part}.{name}.imag", x.real) + linear(w, f"{part}.{name}.real", x.imag))

    joined = complex_linear("joint", frequencies * complex_linear("image", frequencies) + frequencies * complex_linear("text", frequencies))
    return np.fft.irfft(joined, n=length, norm="ortho").T[: len(tau)]


def scan(
    w: Weights, sizes: Sizes, part: str, values: np.ndarray, keys: np.ndarray, queries: np.ndarray, step: np.ndarray, gate: np.ndarray
) -> np.ndarray:
    """The recurrence, item by item: [L, E] -> [L, D]."""
    H, G, N = step.shape[1], groups(sizes), sizes["state"]
    values = values.reshape(len(values), H, -1)  # [L, H, P]
    keys, queries = (np.repeat(x.reshape(len(x), G, N), H // G, axis=1) for x in (keys, queries))  # [L, H, N]
    delta = np.logaddexp(0, step + w[f"{part}.step_bias"])  # softplus [L, H]
    decay = np.exp(-np.exp(w[f"{part}.log_a"]) * delta)
    state, rows = np.zeros((H, values.shape[2], N)), []
    for place in range(len(values)):
        written = (delta[place, :, None] * values[place])[:, :, None] * keys[place][:, None]
        state = decay[place][:, None, None] * state + written
        rows.append((state * queries[place][:, None]).sum(-1) + w[f"{part}.skip"][:, None] * values[place])
    y = np.stack(rows).reshape(len(values), -1) * silu(gate)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + EPSILON) * w[f"{part}.norm_weight"]
    return linear(w, f"{part}.out", y)


def inner(sizes: Sizes) -> int:
    return sizes["expand"] * sizes["width"]


def groups(sizes: Sizes) -> int:
    return sizes["groups"] or inner(sizes) // sizes["head_width"]


def linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def norm(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * w[f"{name}.weight"] + w[f"{name}.bias"]


def convolution(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """Each channel over its own past: x [L, C], weight [C, K]."""
    kernel = w[f"{name}.weight"]
    past = np.concatenate([np.zeros((kernel.shape[1] - 1, x.shape[1])), x])
    return sum(past[k : k + len(x)] * kernel[:, k] for k in range(kernel.shape[1])) + w[f"{name}.bias"]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
