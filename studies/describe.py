"""What a study would run, in words."""

from __future__ import annotations

from studies.cost import expected_cost
from studies.spec import Spec
from studies.study import check


def describe(spec: Spec) -> str:
    """The study's cells and trials, and what they cost at most and, by ASHA's rungs, are expected to."""
    cells = check(spec)
    lines = [
        f"{cell.name}: {cell.search_trials} search + {cell.confirm_seeds} confirm trials over {', '.join(cell.space) or '-'}"
        for cell in cells
    ]
    cost = expected_cost(spec, cells)
    search, confirm = sum(cell.search_trials for cell in cells), sum(cell.confirm_seeds for cell in cells)
    at_most, expected = sum(cell.epochs_at_most for cell in cost.cells), sum(cell.epochs_expected for cell in cost.cells)
    pre = "no pre-training" if spec.pretrain is None else spec.pretrain.checkpoint or f"pre-training on {', '.join(spec.pretrain.sources)}"
    lines.append(
        f"{len(cells)} cells, {search} search and {confirm} confirm trials, at most {at_most:,} epochs (about {expected:,.0f}"
        f" expected); rungs {spec.budget.rungs()}; {pre}. Hours and disk: python -m studies.doctor --measure"
    )
    return "\n".join(lines)
