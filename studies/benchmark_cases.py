"""What `benchmark.py` measures: generated domains of the sizes that matter, and the timing of a step, an evaluation, a run's memory.

Dimensions: B examples, I items, D width, F width of a feature vector.
"""

from __future__ import annotations

import importlib
import multiprocessing
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmm4rec.data import batches
from mmm4rec.data.batches import DomainData
from mmm4rec.data.domain import Domain
from mmm4rec.data.features import MODALITIES, ItemFeatures
from mmm4rec.data.sampler import Plan
from mmm4rec.models import fused, recommender
from mmm4rec.models.mmm4rec import MMM4Rec, ModelConfig
from mmm4rec.run import DataConfig, RunConfig, domain_data
from mmm4rec.training import step
from mmm4rec.training.evaluate import Ranking, evaluate
from mmm4rec.training.loop import Run, TrainingConfig, _optimizer_step

# Prefixes of each length 1, 2, ... among the training examples of Amazon Scientific (5-core, a sample of 2,928 users), cut at 20;
# their mean is 3.4. The 63 of length 20 are those of 13 users.
PREFIXES = (2928, 2928, 1676, 1005, 649, 450, 329, 237, 172, 129, 95, 68, 51, 39, 32, 28, 20, 16, 13, 63)
MFLOP_A_TOKEN = 13.9  # forward and backward of the encoder at the paper's sizes
CPU = torch.device("cpu")
MATMUL = 2048  # the side of the square product whose rate is the floor's


@dataclass(frozen=True)
class Case:
    """A generated domain and the run on it; the defaults are the paper's fine-tuning."""

    items: int = 25_000
    feature_width: int = 768
    batch: int = 1024
    accumulation: int = 8
    width: int = 256
    max_len: int = 20
    ids: bool = True
    loss: str = "full"
    device: str = "cpu"
    precision: str = "float32"
    long: bool = False  # histories up to 1.2 * max_len instead of the lengths of PREFIXES
    folder: str | None = None  # where features lie as memory-mapped float16; None: float32 in memory


def generated_domain(case: Case, *, examples: int, seed: int = 0) -> Domain:
    """Random items at random times, with at least so many training examples."""
    random = np.random.default_rng(seed)
    if case.long:
        users = max(8, -(-examples // (case.max_len // 2)))
        counts = random.integers(case.max_len // 2, round(1.2 * case.max_len) + 1, users) + 3
    else:
        longest = -np.diff(PREFIXES[:-1], append=0)  # users whose longest prefix is 1, 2, ... 19; the last of them reach 24
        longest_of_users = np.repeat(np.arange(1, len(PREFIXES)), longest)
        longest_of_users[longest_of_users == len(PREFIXES) - 1] += 5
        counts = random.permutation(np.tile(longest_of_users + 3, -(-examples // sum(PREFIXES))))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    items = random.integers(1, case.items + 1, offsets[-1]).astype(np.int32)
    times = 1_500_000_000 + np.cumsum(np.exp(random.uniform(4, 13, offsets[-1])).astype(np.int64))
    return Domain(Path("generated"), {"name": "generated", "items": case.items}, offsets, items, times)


def generated_features(case: Case) -> ItemFeatures:
    """Random vectors of both modalities, in memory or as files in `case.folder`."""
    present = dict.fromkeys(MODALITIES, torch.arange(case.items + 1) > 0)
    if case.folder is None:
        random = torch.Generator().manual_seed(0)
        vectors = {m: torch.randn(case.items + 1, case.feature_width, generator=random) * present[m][:, None] for m in MODALITIES}
    else:
        maps = {m: np.load(Path(case.folder) / f"{m}.npy", mmap_mode="c") for m in MODALITIES}
        vectors = {m: torch.from_numpy(table[: case.items]) for m, table in maps.items()}
    return ItemFeatures(case.items, vectors, present, dict.fromkeys(MODALITIES, "random"))


def write_features(folder: Path, items: int, width: int) -> None:
    """Files [items, width] of float16: the rows of a random block again and again, each block with its own scale."""
    block = np.random.default_rng(0).standard_normal((2**16, width), dtype=np.float32)
    for modality in MODALITIES:
        table = np.lib.format.open_memmap(folder / f"{modality}.npy", mode="w+", dtype=np.float16, shape=(items, width))
        for number, first in enumerate(range(0, items, len(block))):
            table[first : first + len(block)] = block[: items - first] * (1 + number / 100)
        table.flush()
        del table


def assemble(case: Case, *, examples: int | None = None, features: ItemFeatures | None = None) -> Run:
    """The run of a case, in training mode, without files."""
    device = torch.device(case.device)
    domain = generated_domain(case, examples=examples or case.batch * case.accumulation)
    features = (features or generated_features(case)).to(device)
    config = ModelConfig(width=case.width, ffn_width=case.width, max_len=case.max_len, ids=case.ids)
    training = TrainingConfig(batch_size=case.batch, accumulation=case.accumulation, loss=case.loss, precision=case.precision)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = MMM4Rec(config, feature_dimensions=features.dimensions, n_items=case.items).to(device)
    data = domain_data(RunConfig(DataConfig(("generated",)), config), domain, features, domain.examples("train"), domain.examples("test"))
    model.train()
    return Run(model, [data], training, 0, device)


def first_plans(run: Run, count: int | None = None) -> list[Plan]:
    return list(islice(run.sampler.plans(1), run.config.accumulation if count is None else count))


def train_step(run: Run, plans: Sequence[Plan]) -> None:
    _optimizer_step(run, step.prepare(run, plans, run.state.optimizer_steps), "")


def seconds(function: Callable[[], Any], device: torch.device = CPU) -> float:
    """Of one call, until the device is done."""
    _wait(device)
    started = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP a second of a square product, median of nine."""
    a = torch.randn(MATMUL, MATMUL, device=device, dtype=dtype)
    taken = [seconds(lambda: a @ a, device) for _ in range(10)][1:]
    return 2 * MATMUL**3 / statistics.median(taken)


def floor_flop(case: Case, tokens: int) -> int:
    """Of a micro-batch with so many real positions: its share of the item adapters (once an optimizer step, forward and the
    weights' gradient; features need none), the logits forward and backward, and the encoder."""
    adapters = 2 * 2 * 2 * case.items * case.feature_width * case.width // case.accumulation
    logits = 3 * 2 * case.batch * case.items * case.width
    return adapters + logits + round(MFLOP_A_TOKEN * 1e6 * tokens)


def reference_module() -> Any:
    """tests/reference.py, the plain implementation: it is no part of the package."""
    folder = Path(__file__).resolve().parent.parent / "tests"
    if not (folder / "reference.py").is_file():
        raise SystemExit(
            f"the plain implementation, {folder / 'reference.py'}, is not here: run the benchmark in a checkout of the project"
        )
    sys.path.insert(0, str(folder))
    return importlib.import_module("reference")


def cpu_step(case: Case, repeats: int, plain_batches: int = 1) -> dict[str, Any]:
    """A training step, ours and the plain one taking turns in this process, beside the matmul floor; and the loader's part."""
    reference, run = reference_module(), assemble(case)
    plans, data, model = first_plans(run), run.data[0], run.model
    assert run.optimizer is not None
    padded = [pad(reference, data, plan) for plan in plans[:plain_batches]]
    tokens = sum(int(np.minimum(plan.shares[0].ends, case.max_len).sum()) for plan in plans) / len(plans)
    taken: dict[str, list[float]] = {"ours": [], "plain": [], "optimizer": [], "loader": [], "rate": []}
    for round_ in range(repeats + 1):
        now = {
            "rate": matmul_rate(run.device),
            "ours": seconds(lambda: train_step(run, plans)) / len(plans),
            "loader": seconds(lambda: step.prepare(run, plans, 0)) / len(plans),
            "optimizer": seconds(run.optimizer.step),
            "plain": seconds(lambda: reference.optimizer_step(model, data.features, run.optimizer, padded)),
        }
        now["plain"] = (now["plain"] - now["optimizer"]) / len(padded) + now["optimizer"] / len(plans)
        if round_:  # the first warms up
            for name, value in now.items():
                taken[name].append(value)
    floor = [floor_flop(case, round(tokens)) / rate for rate in taken["rate"]]
    return {
        "examples": case.batch,
        "positions": tokens,
        "step_seconds": spread(taken["ours"]),
        "plain_seconds": spread(taken["plain"]),
        "times_faster": spread([plain / ours for plain, ours in zip(taken["plain"], taken["ours"], strict=True)]),
        "matmul_gflop_a_second": spread([rate / 1e9 for rate in taken["rate"]]),
        "floor_seconds": spread(floor),
        "share_of_floor": spread([low / ours for low, ours in zip(floor, taken["ours"], strict=True)]),
        "optimizer_share_seconds": spread([value / len(plans) for value in taken["optimizer"]]),
        "loader_share": spread([loader / ours for loader, ours in zip(taken["loader"], taken["ours"], strict=True)]),
    }


def pad(reference: Any, data: DomainData, plan: Plan) -> Any:
    (share,) = plan.shares
    return reference.pad(data.domain, share.users, share.ends, max_len=data.max_len, time=data.time)


def cpu_evaluation(case: Case, repeats: int, users: int = 1024) -> dict[str, Any]:
    """Ranks of users with the prefix lengths of training and of the test split; the catalogue's vectors apart."""
    reference, run = reference_module(), assemble(case)
    data, model = run.data[0], run.model.eval()
    (share,) = first_plans(run, 1)[0].shares
    histories = {"training": (share.users[:users], share.ends[:users]), "test": tuple(part[:users] for part in data.valid)}
    result: dict[str, Any] = {"users": users}
    with torch.inference_mode():
        catalogue = [seconds(partial(Ranking, model, data, run.device)) for _ in range(repeats + 1)][1:]
        ranking = Ranking(model, data, run.device)
        for name, (who, ends) in histories.items():
            padded = pad(reference, data, Plan.of_one(0, who, ends))
            batch = [seconds(partial(ranking.ranks, who, ends)) for _ in range(repeats + 1)][1:]
            plain = [seconds(partial(reference.ranks, model, data.features, padded)) for _ in range(3)][1:]
            length = float(np.minimum(ends, case.max_len).mean())
            result[name] = {"mean_length": length, "batch_seconds": spread(batch), "plain_whole_seconds": spread(plain)}
    return result | {"catalogue_seconds": spread(catalogue)}


def operations(case: Case) -> dict[str, int]:
    """Tensor operations, each a kernel on a GPU, of an optimizer step: plain, and ours with the blocks of a GPU."""
    reference, run = reference_module(), assemble(case)
    plans, data = first_plans(run), run.data[0]
    padded = [pad(reference, data, plan) for plan in plans[:1]]
    with counted() as plain:
        reference.optimizer_step(run.model, data.features, torch.optim.SGD(run.model.parameters(), lr=0.0), padded)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.0)
    with gpu_blocks(), counted() as ours:
        train_step(run, plans)
    return {"plain": plain[0] * len(plans), "ours": ours[0]}


@contextmanager
def gpu_blocks() -> Iterator[None]:
    """On a CPU, the block sizes of a GPU: the same operations are then called."""
    places = ((batches.POSITIONS_AT_ONCE, "cpu", batches.POSITIONS_AT_ONCE["cuda"]), (vars(fused), "ELEMENTS_AT_ONCE", 2**62))
    changes = [*places, (vars(recommender), "ITEMS_IN_CACHE", 2**62)]
    before = [place[name] for place, name, _ in changes]
    for place, name, value in changes:
        place[name] = value
    try:
        yield
    finally:
        for (place, name, _), value in zip(changes, before, strict=True):
            place[name] = value


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the operations that compute something; views and metadata do not."""
    free = re.compile(
        r"view|expand|slice|select|transpose|^t\.|split|unbind|permute|detach|as_strided|squeeze|alias|empty|reshape|_to_copy"
    )
    count = [0]

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            count[0] += not free.search(str(func).removeprefix("aten."))
            return func(*args, **(kwargs or {}))

    with Counter():
        yield count


def one_step(case: Case, examples: int | None = None, evaluate_users: int = 0) -> dict[str, Any]:
    """One optimizer step (and an evaluation) of a fresh process: its time and the most memory that it holds, files apart."""
    with peak_memory() as memory:
        run = assemble(case, examples=examples)
        plans = first_plans(run)
        result: dict[str, Any] = {
            "examples": sum(map(len, plans)),
            "step_seconds": seconds(lambda: train_step(run, plans)),
        }
        if evaluate_users:
            users, ends = (part[:evaluate_users] for part in run.data[0].valid)
            result["evaluation_seconds"] = seconds(lambda: evaluate(run.model, run.data[0], users, ends, run.device))
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in run.model.parameters())
    return result | {"parameter_bytes": parameters, **memory}


def steady_memory(case: Case, steps: int) -> dict[str, Any]:
    """The most memory that a run holds over so many optimizer steps and an evaluation."""
    with peak_memory() as memory:
        run = assemble(case)
        for _ in range(steps):
            train_step(run, first_plans(run))
        users, ends = run.data[0].valid
        evaluate(run.model, run.data[0], users[:1024], ends[:1024], run.device)
    return dict(memory)


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """The peak of this process's anonymous memory (Linux; elsewhere of all its memory), and what of it there was before."""
    before, peak, done = _anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], _anonymous_bytes())

    found: dict[str, int] = {}
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found |= {"before_bytes": before, "peak_bytes": max(peak[0], _anonymous_bytes())}


def _anonymous_bytes() -> int:
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        if match := re.search(r"RssAnon:\s+(\d+) kB", status):
            return int(match[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_fresh_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_call, torch.get_num_threads(), function, *arguments).result()


def _call(threads: int, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return function(*arguments)


def long_histories(case: Case, lengths: Sequence[int], positions: int, repeats: int) -> list[dict[str, Any]]:
    """A step's time and memory for about so many positions, at each max_len."""
    rows = []
    for max_len in lengths:
        examples = max(8, round(positions / (0.6 * max_len)))
        told = replace(case, max_len=max_len, long=True, batch=examples, accumulation=1)
        rows.append({"max_len": max_len, **in_fresh_process(_long_history, told, repeats)})
    return rows


def _long_history(case: Case, repeats: int) -> dict[str, Any]:
    with peak_memory() as memory:
        run = assemble(case)
        plans = first_plans(run)
        taken = [seconds(lambda: train_step(run, plans), run.device) for _ in range(repeats + 1)][1:]
    positions = int(np.minimum(plans[0].shares[0].ends, case.max_len).sum())
    per_thousand = [1e3 * value / positions * 1e3 for value in taken]
    return {"examples": len(plans[0]), "positions": positions, "milliseconds_a_1000_positions": spread(per_thousand), **memory}


def gpu_epoch(case: Case, batches_: int, repeats: int) -> dict[str, Any]:
    """An epoch of so many micro-batches on a GPU, ours and the plain implementation, kernels and memory."""
    reference, run = reference_module(), assemble(case, examples=case.batch * batches_)
    plans, data, size = first_plans(run, batches_), run.data[0], case.accumulation
    groups = [plans[first : first + size] for first in range(0, len(plans), size)]

    def epoch() -> None:
        prepared = (step.prepare(run, group, number) for number, group in enumerate(groups))
        for parts in step.ahead(prepared, run.device):
            _optimizer_step(run, parts, "")

    first = seconds(epoch, run.device)
    torch.cuda.reset_peak_memory_stats(run.device)
    taken = [seconds(epoch, run.device) for _ in range(repeats)]
    padded = [pad(reference, data, plan).to(run.device) for plan in groups[0]]
    plain = [seconds(lambda: reference.optimizer_step(run.model, data.features, run.optimizer, padded), run.device) for _ in range(3)][1:]
    return {
        "micro_batches": batches_,
        "precision": case.precision,
        "first_epoch_seconds": first,
        "epoch_seconds": spread(taken),
        "plain_epoch_seconds": spread([value / len(padded) * batches_ for value in plain]),
        "kernels_an_optimizer_step": _kernels(lambda: train_step(run, groups[0])),
        "plain_kernels_an_optimizer_step": _kernels(lambda: reference.optimizer_step(run.model, data.features, run.optimizer, padded)),
        "peak_bytes": torch.cuda.max_memory_allocated(run.device),
    }


def _kernels(function: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": float(statistics.median(values)), "low": float(min(values)), "high": float(max(values)), "repeats": len(values)}
