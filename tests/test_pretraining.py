"""Facts about training on many domains: what a micro-batch's candidates are, where a run can be left, what it tells on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_reference import assert_same_gradients, gradients
from test_training import drain, in_float64, tiny
from torch import Tensor
from torch.nn import functional as F

from mmm4rec.data.domain import Domain
from mmm4rec.errors import BadInput
from mmm4rec.execute import execute
from mmm4rec.run import RunConfig, assemble
from mmm4rec.training import distributed
from mmm4rec.training.checkpoint import RunCheckpoints, load_last, save_last
from mmm4rec.training.loop import Diverged, EpochReport, Run, StepReport, _cause, fit
from mmm4rec.training.metrics import metrics
from mmm4rec.training.step import add_gradient, prepare

MakeDomain = Callable[..., Domain]


def sources(make_domain: MakeDomain) -> list[Domain]:
    return [make_domain("a"), make_domain("b", users=25, seed=1, items=20, modalities=("text",))]


def pretraining(domains: list[Domain], *, dropout: float = 0.0, **training: Any) -> RunConfig:
    told = {"batch_size": 32, "accumulation": 3, "loss": "in_batch", "epochs": 3, **training}
    return tiny(domains, data={"examples": "all", "heldout_users": 0.2}, model={"dropout": dropout, "ids": False}, training=told)


def losses_of(run: Run, parts: list) -> tuple[float, dict[str, Tensor]]:
    run.model.zero_grad()
    return sum(loss for _, loss in add_gradient(run, parts)), gradients(run)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("logq", [False, True])
def test_candidates_are_the_targets_of_the_micro_batch_of_every_domain_in_it(make_domain: MakeDomain, mixed: bool, logq: bool) -> None:
    """Against the dense form: a column an example, whatever its domain; those of the own item masked; with logq less ln p of its item."""
    run = in_float64(pretraining(sources(make_domain), mixed_batches=mixed, logq=logq))
    plans = list(islice(run.sampler.plans(1), 3))
    found, ours = losses_of(run, prepare(run, plans, 0))
    total = sum(map(len, plans))
    plain = torch.zeros((), dtype=torch.float64)
    for plan in plans:
        users, candidates, names, chance = [], [], [], []
        for share in plan.shares:
            data = run.data[share.domain]
            batch, catalogue = data.batch(share.users, share.ends), run.model.items(data.features)
            users.append(run.model.users(batch, catalogue))
            candidates.append(catalogue.candidates[batch.targets])
            names += [(share.domain, int(item)) for item in batch.targets]
            everything, ends = data.train
            counts = np.bincount(data.domain.items[data.domain.offsets[everything] + ends], minlength=data.domain.n_items + 1)
            of_batch = len(share.users)
            chance += [counts[int(item)] / counts.sum() * of_batch for item in batch.targets]
        scores = torch.cat(users) @ torch.cat(candidates).T / run.model.temperature
        if logq:
            correction = torch.tensor(chance).log()
            scores = scores - correction + torch.diag(correction)  # an example's own target is one, whatever its chance
        same = torch.tensor([[a == b and i != j for j, b in enumerate(names)] for i, a in enumerate(names)])
        assert same.any()
        plain += F.cross_entropy(scores.masked_fill(same, -torch.inf), torch.arange(len(names)), reduction="sum")
    (plain / total).backward()
    assert found == pytest.approx(plain.item(), rel=1e-11)
    assert_same_gradients(ours, gradients(run))


def test_local_candidates_are_a_workers_own_targets(make_domain: MakeDomain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two workers each has half of a micro-batch's examples; with `in_batch` both have all candidates."""
    domain = make_domain()
    for loss, whole in (("in_batch", True), ("in_batch_local", False)):
        run = assemble(pretraining([domain], loss=loss)).run
        (plan,) = islice(run.sampler.plans(1), 1)
        (share,) = plan.shares
        targets = run.data[0].domain.items[run.data[0].domain.offsets[share.users] + share.ends]
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        for rank in (0, 1):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            (part,) = prepare(run, [plan], 0)
            assert part.candidates is not None
            assert part.candidates.items[0].tolist() == sorted(set(targets if whole else targets[rank::2]))
            assert sum(len(chunk.batch) for chunk in part.chunks) == len(targets[rank::2])
        monkeypatch.undo()


class EveryReport:
    """Keeps the newest of all reports, and cuts the run at one of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.saved = path, 0

    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...

    def exists(self) -> bool:
        return self.path.exists()

    def load(self, run: Run, description: dict[str, Any]) -> bool:
        if self.exists():
            load_last(self.path, run, description)
        return self.exists()

    def save(self, run: Run, description: dict[str, Any], *, epoch_over: bool) -> None:
        save_last(self.path, run, description)
        self.saved += 1


def lines(file: Path, *names: str) -> list[tuple]:
    return [tuple(json.loads(line)[name] for name in names) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_that_is_left_at_any_report_goes_on_as_if_it_had_not_been(make_domain: MakeDomain, tmp_path: Path, mixed: bool) -> None:
    """In the middle of an epoch: losses, validation, weights and the lines of both files are those of the run that was not cut.

    With dropout, and a sample of the items: what is drawn at random depends on the step, not on where the run was taken up.
    """
    loss = "sampled" if mixed else "in_batch"
    told = {"mixed_batches": mixed, "loss": loss, "negatives": 20, "sampling_power": 0.5, "steps_between_reports": 2, "epochs": 2}
    config = pretraining(sources(make_domain), dropout=0.3, **told)
    whole = drain(config, tmp_path / "whole")
    place, kept = tmp_path / "cut", EveryReport(tmp_path / "kept.ckpt")
    checkpoints: RunCheckpoints = kept
    for _ in range(100):
        with closing(execute(config, place, resume=True, checkpoints=checkpoints)) as reports:
            for _ in islice(reports, 2):
                pass
        if (place / "result.json").exists():
            break
    assert kept.saved > 6
    result = json.loads((place / "result.json").read_text())
    assert (result["checkpoint"], result["valid"]) == (whole["checkpoint"], whole["valid"])
    step_facts = ("epoch", "optimizer_steps", "train_loss", "domain_losses", "gradient_norm", "learning_rate")
    epoch_facts = ("epoch", "optimizer_steps", "train_loss", "domain_losses", "valid")
    for file, names in (("steps.jsonl", step_facts), ("curve.jsonl", epoch_facts)):
        assert lines(place / file, *names) == lines(tmp_path / "whole" / file, *names)
        assert len(lines(place / file, "epoch")) >= 2


def test_the_reports_add_up(make_domain: MakeDomain) -> None:
    """An epoch's losses are the mean over its steps', weighted by examples; here each report is of one step."""
    run = assemble(pretraining(sources(make_domain), steps_between_reports=1, epochs=1)).run
    reports = list(fit(run))
    steps, (epoch,) = [r for r in reports if isinstance(r, StepReport)], [r for r in reports if isinstance(r, EpochReport)]
    sizes = [sum(len(run.sampler.plan(1, n)) for n in range(3 * k, min(3 * k + 3, len(run.sampler)))) for k in range(len(steps))]
    assert [step.optimizer_steps for step in steps] == list(range(1, len(sizes) + 1))
    assert epoch.train_loss == pytest.approx(np.average([step.train_loss for step in steps], weights=sizes))
    assert set(epoch.domain_losses) == {"a", "b"}
    share_a, share_b = run.sampler.shares
    assert epoch.train_loss == pytest.approx(share_a * epoch.domain_losses["a"] + share_b * epoch.domain_losses["b"])
    assert all(step.examples_per_second > 0 and step.gradient_norm > 0 for step in steps)


def test_zero_shot_is_the_ranking_of_a_domain_that_is_not_trained_on(make_domain: MakeDomain) -> None:
    target = make_domain("target", users=30, seed=5, items=25)
    config = pretraining(sources(make_domain), epochs=1)
    told = {"examples": "all", "heldout_users": 0.2, "zero_shot": [str(target.path)]}
    watched = tiny([*sources(make_domain)], data=told, model={"dropout": 0.0, "ids": False}, training={"loss": "in_batch", "epochs": 1})
    run = assemble(watched).run
    (report,) = fit(run)
    assert isinstance(report, EpochReport)
    users, ends = target.examples("valid")
    (data,) = run.zero_shot
    run.model.eval()
    catalogue = run.model.items(data.features)
    scores = run.model.scores(run.model.users(data.batch(users, ends), catalogue), catalogue)[:, 1:]
    own = scores.gather(1, torch.from_numpy(target.items[target.offsets[users] + ends].astype(np.int64) - 1)[:, None])
    rank = 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    assert report.zero_shot == {"target": pytest.approx(metrics(rank.numpy())["ndcg@10"], abs=1e-6)}
    assert report.valid.keys() == next(iter(fit(assemble(config).run))).valid.keys()  # type: ignore[union-attr]
    with pytest.raises(BadInput, match="trained on too"):
        assemble(tiny([target], data=told, model={"ids": False}))
    with pytest.raises(BadInput, match="without item ids"):
        assemble(tiny([make_domain("other", seed=9)], data={"zero_shot": [str(target.path)]}))


def test_a_loss_that_is_not_finite_names_its_step_domain_and_examples(make_domain: MakeDomain) -> None:
    """One domain's features become infinite after the second step; the weights are those of before."""
    run = assemble(pretraining(sources(make_domain), mixed_batches=True, steps_between_reports=1)).run
    reports = fit(run)
    list(islice(reports, 2))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    for vectors in run.data[1].features.vectors.values():
        vectors.fill_(torch.inf)
    with pytest.raises(Diverged, match=r"optimizer step 3, epoch 1, micro-batches 6-8; domain 'b' has items whose .* not finite: \d"):
        next(reports)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert run.state.optimizer_steps == 2
    parts = prepare(run, list(islice(run.sampler.plans(1), 1)), 0)
    chunk = next(chunk for chunk in parts[0].chunks if chunk.domain == 0)
    for vectors in run.data[1].features.vectors.values():
        vectors.zero_()
    assert _cause(run, parts, [(chunk, 9.0)]).startswith(
        f"worst in domain 'a': {9 / len(chunk.batch):.4g} over {len(chunk.batch)} examples"
    )


def test_a_loss_that_grows_beyond_its_bound_ends_the_run(make_domain: MakeDomain) -> None:
    run = assemble(pretraining(sources(make_domain), learning_rate=50.0, divergence=1.5, epochs=20)).run
    with pytest.raises(Diverged, match=r"training diverged: the mean loss is \S+ \(the first step's was"):
        list(fit(run))
    calm = assemble(pretraining(sources(make_domain), divergence=1.5, epochs=2)).run
    assert len(list(fit(calm))) == 2
