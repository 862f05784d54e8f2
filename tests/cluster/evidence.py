"""What a study left behind: which machines ran its trials, and whether its journal is whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

COUNTS = {
    "searched": "select count(*) from trials where phase = 'search'",
    "confirmed": "select count(*) from trials where phase = 'confirm' and outcome = 'finished'",
    "unfinished": "select count(*) from trials where outcome = 'running'",
    "failed": "select count(*) from trials where outcome = 'failed'",
    "holes": """select count(*) from (select count(*) epochs, min(epoch) first, max(epoch) last from reports group by trial_key)
                where epochs <> last - first + 1""",
}


def trials(study: Path) -> dict[str, dict[str, Any]]:
    """By trial: the machines whose processes wrote its log, and whether it has ended, from its files in the shared storage."""
    found = {}
    for folder in sorted((study / "trials").glob("*")):
        log = folder / "log.txt"
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        nodes = re.findall(r"^\S+ \S+ (\S+) WARNING .* begins or goes on", text, re.MULTILINE)
        found[folder.name] = {"nodes": nodes, "ended": (folder / "result.json").exists()}
    return found


def by_node(study: Path) -> str:
    """How often a process of each machine began a trial or went on with one."""
    seen = trials(study)
    nodes = sorted({node for trial in seen.values() for node in trial["nodes"]})
    return f"{len(seen)} trials; begun or gone on with: " + ", ".join(
        f"{sum(trial['nodes'].count(node) for trial in seen.values())} on {node}" for node in nodes
    )


def counting(journal: str) -> str:
    """A Python program that prints the counts of the journal as JSON."""
    return f"""
import json, sqlite3
database = sqlite3.connect({journal!r})
print(json.dumps({{name: database.execute(query).fetchone()[0] for name, query in {COUNTS!r}.items()}}))
"""
