"""The leak check: what a model must not read changes no score.

Dimensions: K examples, B examples of a batch, W windows, Q positions of a window, T = max_len, I items, F width of a feature
vector.

The check alters what stands outside an example's history and measures the largest change of a score. It runs in
float64 on the CPU, where another order of a sum moves a score by 1e-14 (by 1e-9 in long histories), a real leak by far more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmm4rec.data.batches import Batch, DomainData, Packing, in_order
from mmm4rec.data.domain import Domain
from mmm4rec.data.features import MODALITIES, ItemFeatures
from mmm4rec.errors import BadInput
from mmm4rec.models.blocks import Scan
from mmm4rec.models.mmm4rec import MMM4Rec, ModelConfig
from mmm4rec.models.recommender import Recommender
from mmm4rec.run import DataConfig, RunConfig, domain_data

TOLERANCE = 1e-7  # a larger change is a leak; the unit is the standard deviation of the scores
ITEM, TIME, AFTER = "the target item", "the target's time", "what follows the target"
PADDING, BATCH = "padding", "the rest of the batch"
PUBLISHED_LEAKS = (TIME, PADDING)  # of the release: Quirks.label_time and Quirks.zero_stamps
TIME_SHIFTS_SECONDS = (3 * 3600, -3 * 3600, 200 * 86400, -200 * 86400)
LENGTHS, EACH = 20, 3  # how many lengths of history are tried, and examples of each
BATCH_POSITIONS = 4096  # examples of a batch times T: bounds the memory of models with long histories
Change = Callable[[Batch], Batch]
SMALL: dict[str, Any] = {"width": 32, "ffn_width": 32, "head_width": 8, "state": 8, "layers": 2, "max_len": 12}


@dataclass(frozen=True)
class Finding:
    """What one alteration did."""

    alteration: str
    change: float | None  # the largest change of a score, in standard deviations of the scores; None: there was nothing to alter
    lengths: tuple[int, ...]  # items that the model reads of the histories whose scores changed by more than TOLERANCE


@dataclass(frozen=True)
class LeakReport:
    """The leak check of one model."""

    variant: str
    examples: int
    shortest: int  # of their histories
    longest: int
    max_len: int
    findings: tuple[Finding, ...]

    @property
    def leaks(self) -> tuple[str, ...]:
        return tuple(finding.alteration for finding in self.findings if finding.lengths)

    @property
    def verdict(self) -> str:
        return f"LEAKS: {', '.join(self.leaks)}" if self.leaks else "clean"

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "leaks": self.leaks, "findings": [vars(finding) for finding in self.findings]}


@torch.inference_mode()
def check_leaks(model: Recommender, data: DomainData, *, variant: str = "model", seed: int = 0) -> LeakReport:
    """Alter all that the scores of an example must not depend on, one thing at a time, and measure what changes.

    The examples end in the middle of histories where they can, and their lengths go from the shortest to
    beyond max_len, as far as the domain has such. The model itself is left as it is.
    Raises BadInput when no history has a target, FloatingPointError when a score is not finite.
    """
    random, (model, data) = np.random.default_rng(seed), _in_float64(model, data)
    users, ends = _choose_examples(data.domain, data.max_len, random)
    domain = _a_user_an_example(data.domain, users, np.diff(data.domain.offsets)[users])
    scores = partial(_scores, model, data, ends, block=max(2, BATCH_POSITIONS // data.max_len))
    before, lengths = scores(domain), np.minimum(ends, data.max_len)
    altered = {
        ITEM: [scores(other) for other in _other_targets(domain, ends, random)],
        TIME: [scores(other) for other in _other_target_times(domain, ends)],
        AFTER: [scores(other) for other in _other_futures(domain, ends, random)],
        PADDING: [scores(domain, change=lambda batch: _fill_padding(batch, data, random))] if min(ends) < data.max_len else [],
        BATCH: [scores(domain, block=1)] if len(ends) > 1 else [],
    }
    findings = tuple(_finding(name, before, parts, lengths) for name, parts in altered.items())
    return LeakReport(variant, len(ends), int(ends.min()), int(ends.max()), data.max_len, findings)


def _finding(alteration: str, before: Tensor, altered: list[Tensor], lengths: np.ndarray) -> Finding:
    """Compare scores [K, I] of histories of lengths [K]. Two masked scores are equal; one is a change without bound."""
    if not altered:
        return Finding(alteration, None, ())
    spread = before[before.isfinite()].std(correction=0).item() or 1.0
    differences = [torch.where(part == before, 0.0, (part - before).abs()).amax(1) / spread for part in altered]  # [K] each
    changes = torch.stack(differences).amax(0).nan_to_num(posinf=torch.finfo(before.dtype).max)
    return Finding(alteration, changes.max().item(), tuple(np.unique(lengths[(changes > TOLERANCE).numpy()]).tolist()))


def _in_float64(model: Recommender, data: DomainData) -> tuple[Recommender, DomainData]:
    """Copies for the check. The scan is `auto`: the GPU kernel, if the config asks for it, knows no float64."""
    model = copy.deepcopy(model).cpu().double().eval()
    for part in model.modules():
        if isinstance(part, Scan):
            part.config = replace(part.config, scan="auto")
    features = data.features.to(torch.device("cpu"))
    features = replace(features, vectors={modality: vectors.double() for modality, vectors in features.vectors.items()})
    return model, replace(data, features=features)


def _choose_examples(domain: Domain, max_len: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Users and ends [K] of examples of many lengths, in random order; those with events after the target are preferred."""
    users, ends = domain.examples("all")
    if not len(users):
        raise BadInput(f"domain '{domain.name}' has no history of 2 interactions.", file=domain.path, remedy="Choose a larger domain.")
    lengths = np.minimum(ends, max_len + 1)  # max_len + 1 stands for all that are cut
    is_last = ends + 1 == np.diff(domain.offsets)[users]
    order = np.lexsort((random.random(len(ends)), is_last, lengths))
    known, starts, counts = np.unique(lengths[order], return_index=True, return_counts=True)
    kept = np.isin(known, [*known[np.linspace(0, len(known) - 1, LENGTHS).round().astype(int)], max_len - 1, max_len])
    places = [start + np.arange(min(EACH, count)) for start, count in zip(starts[kept], counts[kept], strict=True)]
    chosen = random.permutation(order[np.concatenate(places)])
    return users[chosen], ends[chosen]


def _a_user_an_example(domain: Domain, users: np.ndarray, counts: np.ndarray) -> Domain:
    """A domain in memory whose user k has the first counts[k] interactions of users[k]: altering one alters no other."""
    offsets = np.concatenate([[0], np.cumsum(counts)])
    rows = np.repeat(domain.offsets[users] - offsets[:-1], counts) + np.arange(offsets[-1])
    times = None if domain.timestamps is None else domain.timestamps[rows]
    return replace(domain, offsets=offsets, items=domain.items[rows], timestamps=times)


def _scores(model: Recommender, data: DomainData, ends: np.ndarray, domain: Domain, block: int, change: Change = lambda b: b) -> Tensor:
    """Scores [K, I] of all items but padding for the examples (user k, ends[k]), as they are ranked, `block` at a time."""
    data, catalogue, parts = replace(data, domain=domain), model.items(data.features), []
    for users, block_ends in in_order(np.arange(len(ends)), ends, block):
        batch = change(data.batch(users, block_ends))
        scores = model.scores(model.users(batch, catalogue), catalogue)  # [B, I + 1]
        if not torch.isfinite(scores).all():
            raise FloatingPointError(f"the model's scores on domain '{data.domain.name}' are not finite: there is nothing to compare")
        data.mask(scores, batch.users, batch.ends)
        parts.append(scores[:, 1:])
    return torch.cat(parts)


def _other_targets(domain: Domain, ends: np.ndarray, random: np.random.Generator) -> list[Domain]:
    """Another item in the place of every target; none where the domain has but one item."""
    if domain.n_items == 1:
        return []
    rows, items = domain.offsets[:-1] + ends, domain.items.copy()
    items[rows] = 1 + (items[rows] - 1 + random.integers(1, domain.n_items, len(rows))) % domain.n_items
    return [replace(domain, items=items)]


def _other_target_times(domain: Domain, ends: np.ndarray) -> list[Domain]:
    """Every target earlier and later, by hours and by months; none without timestamps."""
    times, is_target = domain.timestamps, np.zeros(len(domain.items), dtype=np.int64)
    is_target[domain.offsets[:-1] + ends] = 1
    return [] if times is None else [replace(domain, timestamps=times + seconds * is_target) for seconds in TIME_SHIFTS_SECONDS]


def _other_futures(domain: Domain, ends: np.ndarray, random: np.random.Generator) -> list[Domain]:
    """Other items at other times after every target, then nothing after it; none where nothing follows."""
    positions = np.arange(len(domain.items)) - np.repeat(domain.offsets[:-1], np.diff(domain.offsets))
    after = positions > np.repeat(ends, np.diff(domain.offsets))
    if not after.any():
        return []
    items = np.where(after, random.integers(1, domain.n_items + 1, len(after)), domain.items)
    times = None if domain.timestamps is None else domain.timestamps + after * random.integers(1, 10**8, len(after))
    return [replace(domain, items=items, timestamps=times), _a_user_an_example(domain, np.arange(len(ends)), ends + 1)]


def _fill_padding(batch: Batch, data: DomainData, random: np.random.Generator) -> Batch:
    """Items and gaps wherever no history stands, and T more such positions in every window.

    With `label_time` the target's gap stands before the padding.
    """
    packing, T = batch.packing, data.max_len
    (W, Q), window = packing.positions.shape, packing.positions.shape[1] + T
    positions = F.pad(packing.positions, (0, T), value=-1)  # [W, Q + T]
    items = torch.from_numpy(random.integers(1, data.domain.n_items + 1, (W, window)))
    items[:, :Q] = torch.where(packing.positions < 0, items[:, :Q], batch.items)
    wider = Packing(positions, F.pad(packing.examples, (0, T)), packing.last // Q * window + packing.last % Q, packing.lengths)
    gaps = batch.gap_seconds
    if gaps is not None:
        behind = torch.arange(T) >= packing.lengths[:, None] + data.view.label_time  # [B, T]
        gaps = torch.where(behind, torch.from_numpy(random.uniform(-1e7, 1e7, behind.shape)).to(gaps), gaps)
    return replace(batch, items=items, packing=wider, gap_seconds=gaps)


def check_generated() -> tuple[list[LeakReport], bool]:
    """The default and the published model, random, on a generated domain; and whether they come out as they should."""
    variants = {"default": ModelConfig(**SMALL), "published": ModelConfig.published(**SMALL)}
    reports = [check_leaks(*generated_model(config), variant=variant) for variant, config in variants.items()]
    return reports, reports[0].leaks == () and reports[1].leaks == PUBLISHED_LEAKS


def generated_model(config: ModelConfig, *, users: int = 60, items: int = 40, seed: int = 0) -> tuple[Recommender, DomainData]:
    """A model with random weights and a domain in memory, with histories up to three times max_len."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(counts := random.integers(2, 3 * config.max_len, users))])
    times = [1_500_000_000 + np.cumsum(np.exp(random.uniform(4, 17, n)).astype(np.int64)) for n in counts]  # gaps: a minute to 280 days
    sequence = random.integers(1, items + 1, offsets[-1]).astype(np.int32)
    domain = Domain(Path("generated"), {"name": "generated", "items": items}, offsets, sequence, np.concatenate(times))
    vectors = {modality: torch.from_numpy(random.standard_normal((items + 1, 16))).float() for modality in MODALITIES}  # [I + 1, F]
    present = dict.fromkeys(MODALITIES, torch.arange(items + 1) > 0)  # [I + 1]
    features = ItemFeatures(items, vectors, present, dict.fromkeys(MODALITIES, "random"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MMM4Rec(config, feature_dimensions=features.dimensions, n_items=items)
    return with_noise(model, seed), domain_data(RunConfig(DataConfig((domain.name,)), config), domain, features)


def with_noise(model: Recommender, seed: int = 0) -> Recommender:
    """A copy with every parameter moved: what the weights hardly read yet, but could, shows (a new model is all but blind to time)."""
    model, random = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    return model


def leak_lines(reports: list[LeakReport]) -> list[str]:
    """What was measured, the changes (a row an alteration, a column a model) and the verdicts."""
    first, table = reports[0], [f"{'':24}" + "".join(f"{report.variant:>18}" for report in reports)]
    for parts in zip(*(report.findings for report in reports), strict=True):
        cells = (f"{'-' if part.change is None else f'{part.change:.1e}':>18}" for part in parts)
        table.append(f"{parts[0].alteration:24}" + "".join(cells))
    return [
        f"Largest change of a score, in standard deviations of the scores; above {TOLERANCE:.0e} it is a leak.",
        f"{first.examples} examples, histories of {first.shortest} to {first.longest} items; a model reads the last {first.max_len}.",
        *("", *table, ""),
        *(f"{report.variant}: {report.verdict}" for report in reports),
    ]
