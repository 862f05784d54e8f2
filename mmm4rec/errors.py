"""The one error for input that is wrong: the command line prints it and exits with status 2."""

from __future__ import annotations

from pathlib import Path


class BadInput(Exception):
    """Input breaks a rule. Its message names the file, the line, the rule and the remedy."""

    def __init__(
        self,
        rule: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        remedy: str | None = None,
    ) -> None:
        """Args: rule: what is wrong, with the values; line: counted from 1; remedy: what to do now."""
        self.rule, self.file, self.line, self.remedy = rule, file, line, remedy
        place = "" if file is None else f"{file}{'' if line is None else f':{line}'}: "
        super().__init__(f"{place}{rule}{'' if remedy is None else f' {remedy}'}")
