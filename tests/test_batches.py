"""Examples to windows and back, by brute force."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mmm4rec.data.batches import Packing, TimeView, cut, fit_into_windows, make_batch, pack
from mmm4rec.data.domain import Domain

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0)
LENGTHS = {
    "geometric": np.minimum(RANDOM.geometric(0.15, 5000), 20),
    "long": RANDOM.integers(1, 1001, 400),
    "of one length": np.full(50, 7),
    "of one position": np.ones(9, dtype=np.int64),
    "one": np.array([13]),
    "none that pair": np.full(6, 11),
}
SOME = np.array([3, 1, 8, 5, 5, 1, 2, 8, 4])


def packed(lengths: np.ndarray) -> tuple[Tensor, Packing, list[list[int]]]:
    """Histories of these lengths with random items in windows, and the histories as they came."""
    histories = [np.random.default_rng(k).integers(1, 100, n).tolist() for k, n in enumerate(lengths)]
    return *pack(np.concatenate(histories), lengths), histories


@pytest.mark.parametrize("name", LENGTHS)
def test_windows_hold_every_history_whole_and_no_two_at_one_place(name: str) -> None:
    lengths, window = LENGTHS[name], 20 if name == "none that pair" else int(LENGTHS[name].max())
    starts, windows = fit_into_windows(lengths, window)
    taken = np.zeros(windows * window, dtype=int)
    for start, length in zip(starts, lengths, strict=True):
        taken[start : start + length] += 1
        assert start % window + length <= window
    assert taken.max() == 1
    assert taken.reshape(windows, window).any(1).all()
    assert -(-lengths.sum() // window) <= windows <= len(lengths)
    assert (taken.reshape(windows, window).sum(1) <= window / 2).sum() <= 1, "two half-empty windows would have been one"


def test_windows_are_nearly_full() -> None:
    lengths = LENGTHS["geometric"]
    assert lengths.max() == 20
    assert lengths.sum() / (fit_into_windows(lengths, 20)[1] * 20) >= 0.97
    assert fit_into_windows(np.full(50, 5), 20)[1] == 13
    assert fit_into_windows(np.full(6, 11), 20)[1] == 6
    assert fit_into_windows(np.array([1, 19, 2, 18, 10, 10]), 20)[1] == 3


@pytest.mark.parametrize("lengths", [SOME, *LENGTHS.values()], ids=["some", *LENGTHS])
def test_a_packing_names_every_position(lengths: np.ndarray) -> None:
    items, packing, histories = packed(lengths)
    assert items.shape[1] == lengths.max()
    assert packing.lengths.tolist() == lengths.tolist()
    where = {}
    for place, (position, example) in enumerate(
        zip(packing.positions.flatten().tolist(), packing.examples.flatten().tolist(), strict=True)
    ):
        if position < 0:
            assert (position, example, items.flatten()[place]) == (-1, 0, 0)
        else:
            where[example, position] = place
    assert sorted(where) == [(k, p) for k, n in enumerate(lengths) for p in range(n)]
    for k, history in enumerate(histories):
        places = [where[k, p] for p in range(len(history))]
        assert places == list(range(places[0], places[0] + len(history)))
        assert items.flatten()[places].tolist() == history
        assert packing.last[k] == places[-1]


def test_what_a_packing_does_by_brute_force() -> None:
    items, packing, histories = packed(SOME)
    W, Q = items.shape
    x, per_example = torch.randn(W, Q, 2, 3), torch.randn(len(SOME), 4)
    signal = torch.randn(len(SOME), 2, 8)  # [B, H, T]
    x[packing.positions < 0] = 0
    spread, at_tokens, to_end = packing.spread(signal), packing.at_tokens(per_example), packing.to_end
    sums = torch.zeros(len(SOME), 2, 3)
    for w, q in np.ndindex(W, Q):
        k, position = int(packing.examples[w, q]), int(packing.positions[w, q])
        if position >= 0:
            assert torch.equal(spread[w, q], signal[k, :, position])
            assert torch.equal(at_tokens[w, q], per_example[k])
            assert to_end[w, q] == len(histories[k]) - 1 - position
            sums[k] += x[w, q]
            if position == len(histories[k]) - 1:
                assert torch.equal(packing.at_last(x)[k], x[w, q])
    torch.testing.assert_close(packing.sum_up(x), sums)
    assert packing.at_last(items).tolist() == [history[-1] for history in histories]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_recent_positions_by_brute_force(count: int) -> None:
    items, packing, histories = packed(SOME)
    places, exists = packing.recent(count)
    assert places.shape == exists.shape == (len(SOME), count)
    for k, history in enumerate(histories):
        found = items.flatten()[places[k]][exists[k]].tolist()
        assert found == history[::-1][:count]
        assert exists[k].tolist() == [back < len(history) for back in range(count)]


def test_stacked_copies_are_as_many_packings() -> None:
    items, packing, _ = packed(SOME)
    assert packing.stacked(1) is packing
    three = packing.stacked(3)
    parts = [items + 100 * copy for copy in range(3)]
    assert torch.equal(three.at_last(torch.cat(parts)), torch.cat([packing.at_last(part) for part in parts]))
    assert torch.equal(three.sum_up(torch.cat(parts)), torch.cat([packing.sum_up(part) for part in parts]))
    signals = [torch.randn(len(SOME), 2, 8) for _ in range(3)]
    assert torch.equal(three.spread(torch.cat(signals)), torch.cat([packing.spread(signal) for signal in signals]))
    assert torch.equal(three.to_end, packing.to_end.repeat(3, 1))
    (places, exists), (places_once, exists_once) = three.recent(4), packing.recent(4)
    assert torch.equal(exists, exists_once.repeat(3, 1))
    assert torch.equal(places[exists][-int(exists_once.sum()) :], places_once[exists_once] + 2 * items.numel())


@pytest.mark.parametrize("view", [None, TimeView(label_time=True)], ids=["items", "label_time"])
@pytest.mark.parametrize("max_len", [1, 3, 8, 20])
def test_a_batch_by_brute_force(make_domain: Callable[..., Domain], max_len: int, view: TimeView | None) -> None:
    domain = make_domain()
    users, ends = domain.examples("all")
    shuffled = np.random.default_rng(1).permutation(len(users))[:150]
    users, ends = users[shuffled], ends[shuffled]
    batch = make_batch(domain, users, ends, max_len=max_len, time=True, **({} if view is None else {"view": view}))
    assert batch.gap_seconds is not None
    assert domain.timestamps is not None
    assert batch.gap_seconds.shape == batch.timed.shape == (len(batch), max_len)
    for k, (user, end) in enumerate(zip(users, ends, strict=True)):
        first, stop = domain.offsets[user] + max(0, end - max_len), domain.offsets[user] + end
        mine = (batch.packing.examples == k) & (batch.packing.positions >= 0)
        assert batch.items[mine].tolist() == domain.items[first:stop].tolist()
        assert batch.packing.positions[mine].tolist() == list(range(stop - first))
        assert batch.targets[k] == domain.items[stop]
        read = min(stop - first + (view is not None), max_len)
        gaps = [0.0, *np.diff(domain.timestamps[first : first + read]).tolist()]
        assert batch.gap_seconds[k].tolist() == gaps + [0.0] * (max_len - read)
        assert batch.timed[k].tolist() == [True] * read + [False] * (max_len - read)


def test_a_whole_history_needs_no_target_and_shows_no_time_of_one(make_domain: Callable[..., Domain]) -> None:
    domain = make_domain()
    users, ends = np.arange(domain.n_users), np.diff(domain.offsets)
    batch = make_batch(domain, users, ends, max_len=20, time=True, view=TimeView(label_time=True), with_targets=False)
    plain = make_batch(domain, users, ends, max_len=20, time=True, with_targets=False)
    assert not batch.targets.any()
    assert torch.equal(batch.timed, torch.arange(20) < torch.from_numpy(ends)[:, None])
    assert batch.gap_seconds is not None
    assert plain.gap_seconds is not None
    assert torch.equal(batch.gap_seconds, plain.gap_seconds)
    assert batch.packing.at_last(batch.items).tolist() == domain.items[domain.offsets[1:] - 1].tolist()


@pytest.mark.parametrize("time", [True, False])
def test_a_batch_without_times(make_domain: Callable[..., Domain], time: bool) -> None:
    domain = make_domain(timestamps=not time)
    batch = make_batch(domain, *domain.examples("test"), max_len=8, time=time)
    assert batch.gap_seconds is None
    assert torch.equal(batch.timed, torch.arange(8) < batch.packing.lengths[:, None])


def test_compact_items_are_rows_of_ascending_ids(make_domain: Callable[..., Domain]) -> None:
    domain = make_domain(items=300)
    batch = make_batch(domain, *domain.examples("valid"), max_len=8, time=False)
    ids, compact = batch.compact()
    assert ids.tolist() == sorted(set(batch.items.flatten().tolist()))
    assert torch.equal(ids[compact.items], batch.items)
    assert torch.equal(compact.targets, batch.targets), "targets stay ids"


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("at_once", [1, 64, 1000, 10**6])
def test_cuts_cover_every_example_once_with_about_equal_positions(
    monkeypatch: pytest.MonkeyPatch, lengths: np.ndarray, at_once: int
) -> None:
    monkeypatch.setattr("mmm4rec.data.batches.POSITIONS_AT_ONCE", {"cpu": at_once})
    parts = cut(lengths, CPU)
    assert np.concatenate([np.arange(len(lengths))[part] for part in parts]).tolist() == list(range(len(lengths)))
    sums, longest = np.array([lengths[part].sum() for part in parts]), lengths.max()
    assert sums.min() > 0
    wanted = -(-lengths.sum() // at_once)
    assert len(parts) <= wanted
    assert sums.max() <= lengths.sum() / wanted + longest
    if lengths.sum() / wanted > longest:  # otherwise an example may be more than a part
        assert len(parts) == wanted
        assert sums.min() >= lengths.sum() / wanted - longest


def test_no_examples_are_no_cuts_and_an_unknown_device_is_cut_as_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmm4rec.data.batches.POSITIONS_AT_ONCE", {"cpu": 12, "cuda": 1000})
    assert cut(np.empty(0, dtype=np.int64), CPU) == []
    assert cut(np.full(20, 5), CPU) == cut(np.full(20, 5), torch.device("mps"))
    assert len(cut(np.full(20, 5), CPU)) == 9
    assert cut(np.full(20, 5), torch.device("cuda")) == [slice(0, 20)]
