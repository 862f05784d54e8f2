"""What a doctor finds, in order and in words."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

Level = Literal["ok", "warning", "error"]

WORST_FIRST: tuple[Level, ...] = ("error", "warning", "ok")
WIDTH = 120


@dataclass(frozen=True)
class Finding:
    """One thing looked at. An error would fail the study; a warning costs time, or may."""

    name: str
    level: Level
    what: str
    remedy: str | None = None
    node: str | None = None  # of Ray; None: the study and its driver


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """The study's first, then node by node, the worst node first; in each the worst first."""

    def badness(finding: Finding) -> int:
        return WORST_FIRST.index(finding.level)

    worst = {node: min(badness(f) for f in findings if f.node == node) for node in {f.node for f in findings}}
    return sorted(findings, key=lambda f: (f.node is not None, worst[f.node], f.node or "", badness(f)))


def exit_status(findings: Sequence[Finding]) -> int:
    return 1 if any(finding.level == "error" for finding in findings) else 0


def table(findings: Sequence[Finding]) -> str:
    """Readable, with a last line that counts."""
    lines: list[str] = []
    longest = max((len(finding.name) for finding in findings), default=0)
    for node, part in groupby(in_order(findings), key=lambda finding: finding.node):
        lines += ["", "The study" if node is None else f"Node {node}"]
        for finding in part:
            lead = f"  {finding.level:8}{finding.name:{longest}}  "
            lines += _wrapped(finding.what, lead)
            if finding.remedy is not None and finding.level != "ok":
                lines += _wrapped(finding.remedy, " " * len(lead) + "-> ")
    errors, warnings = (sum(finding.level == level for finding in findings) for level in ("error", "warning"))
    return "\n".join([*lines[1:], "", f"{errors} errors, {warnings} warnings"])


def _wrapped(text: str, lead: str) -> list[str]:
    """The text's lines under one another, the first behind `lead`."""
    rows = [row for line in text.splitlines() for row in textwrap.wrap(line, max(WIDTH - len(lead), 40), break_long_words=False)] or [""]
    return [lead + rows[0], *(" " * len(lead) + row for row in rows[1:])]
