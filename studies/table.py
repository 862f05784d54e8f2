"""A table of results, and its four forms: CSV, Markdown, LaTeX (booktabs) and HTML."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from studies.significance import Interval


@dataclass(frozen=True)
class Sample:
    """A number over seeds."""

    values: tuple[float, ...]
    digits: int = 4
    at_least: bool = False  # a bound: in some seed the event did not come
    best: bool = False
    second: bool = False
    marked: bool = False  # ahead of the second by more than users and seeds explain

    def text(self) -> str:
        """`0.1234 ± 0.0056`; without seeds `-`, with one no spread."""
        if not self.values:
            return "-"
        spread = f" ± {stdev(self.values):.{self.digits}f}" if len(self.values) > 1 else ""
        return f"{'≥ ' if self.at_least else ''}{mean(self.values):.{self.digits}f}{spread}{'*' if self.marked else ''}"


@dataclass(frozen=True)
class Link:
    """A text that leads somewhere; only HTML shows where."""

    label: str
    url: str

    def text(self) -> str:
        return self.label


FORMS = ("csv", "md", "tex", "html")

Entry = str | int | float | Sample | Interval | Link


@dataclass(frozen=True)
class Table:
    """Column names and rows, with what must be known to read them."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    caption: str = ""
    notes: tuple[str, ...] = ()  # sentences below it

    def to_csv(self) -> str:
        """A sample as two columns, its mean and its sd, an interval as three, mean, low and high; at full precision."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        kinds = [{type(row[i]) for row in self.rows} for i in range(len(self.columns))]
        writer.writerow([name for column, kind in zip(self.columns, kinds, strict=True) for name in _csv_names(column, kind)])
        for row in self.rows:
            writer.writerow([value for entry, kind in zip(row, kinds, strict=True) for value in _csv_values(entry, kind)])
        return out.getvalue()

    def to_markdown(self) -> str:
        """The rows and the notes; the caption is left to the page around it."""
        texts = [[_dressed(entry, "**{}**", "<u>{}</u>", escape=_markdown) for entry in row] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(self.columns, *texts, strict=True)]
        lines = [self.columns, ["-" * width for width in widths], *texts]
        table = "".join(f"| {' | '.join(text.ljust(width) for text, width in zip(line, widths, strict=True))} |\n" for line in lines)
        return table + "".join(f"\n{note}\n" for note in self.notes)

    def to_latex(self) -> str:
        """A booktabs tabular with its caption in a table environment; a rule stands between domains."""
        lines = [r"\begin{table}", r"\centering"]
        caption = " ".join([self.caption, *self.notes]).strip()
        lines += [rf"\caption{{{latex(caption)}}}"] if caption else []
        lines += [rf"\begin{{tabular}}{{{'l' * len(self.columns)}}}", r"\toprule", _latex_row(map(latex, self.columns)), r"\midrule"]
        grouped = len({row[0] for row in self.rows}) < len(self.rows)
        for before, row in zip([None, *self.rows], self.rows, strict=False):
            lines += [r"\midrule"] * (grouped and before is not None and before[0] != row[0])
            lines.append(_latex_row(_dressed(entry, r"\textbf{{{}}}", r"\underline{{{}}}", escape=latex) for entry in row))
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"

    def to_html(self) -> str:
        texts = [all(isinstance(row[place], str | Link) for row in self.rows) for place in range(len(self.columns))]
        head = "".join(f"<th{' class=text' * text}>{html.escape(name)}</th>" for name, text in zip(self.columns, texts, strict=True))
        body = "\n".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in self.rows)
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        notes = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in self.notes)
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>\n{notes}\n"

    def write(self, folder: Path, name: str) -> None:
        """Write `name`.csv, .md, .tex and .html into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = (self.to_csv, self.to_markdown, self.to_latex, self.to_html)
        for suffix, form in zip(FORMS, texts, strict=True):
            (folder / f"{name}.{suffix}").write_text(form(), encoding="utf-8")


def latex(text: str) -> str:
    """The text with LaTeX's own signs escaped."""
    escaped = re.sub(r"[\\%_&#${}]", lambda found: r"\textbackslash{}" if found[0] == "\\" else "\\" + found[0], text)
    escaped = re.sub(r"(?<!\w)-(?=\d)", "$-$", escaped)  # a minus sign, not a hyphen
    for sign, command in (
        ("<", "$<$"),
        (">", "$>$"),
        ("|", "$|$"),
        ("^", r"\textasciicircum{}"),
        ("±", r"$\pm$"),
        ("≥", r"$\geq$"),
        ("Δ", r"$\Delta$"),
        ("×", r"$\times$"),
        ("~", r"\textasciitilde{}"),
    ):
        escaped = escaped.replace(sign, command)
    return escaped


def _markdown(text: str) -> str:
    return text.replace("|", r"\|")


def _csv_names(column: str, kinds: set[type]) -> list[str]:
    if Interval in kinds:
        return [f"{column} mean", f"{column} low", f"{column} high"]
    return [f"{column} mean", f"{column} sd"] if Sample in kinds else [column]


def _csv_values(entry: Entry, kinds: set[type]) -> list[object]:
    """As many values as the column has names; an entry that is none of its kind fills the first."""
    if isinstance(entry, Interval):
        return ["" if value is None else value for value in (entry.mean, entry.low, entry.high)]
    if isinstance(entry, Sample):
        return [mean(entry.values) if entry.values else "", stdev(entry.values) if len(entry.values) > 1 else ""]
    value: object = entry.label if isinstance(entry, Link) else entry
    return [value, "", ""][: 3 if Interval in kinds else 2 if Sample in kinds else 1]


def _text(entry: Entry) -> str:
    return entry.text() if isinstance(entry, Sample | Interval | Link) else f"{entry:.4f}" if isinstance(entry, float) else str(entry)


def _weight(entry: Entry) -> int:
    """2: the best of its domain, or an interval that excludes 0; 1: the second."""
    if isinstance(entry, Sample):
        return 2 * entry.best or int(entry.second)
    return 2 * (isinstance(entry, Interval) and entry.excludes_zero)


def _dressed(entry: Entry, best: str, second: str, *, escape: Callable[[str], str] = str) -> str:
    """An entry as text, put into a pattern where it weighs more than others."""
    return ("{}", second, best)[_weight(entry)].format(escape(_text(entry)))


def _html_cell(entry: Entry) -> str:
    text = html.escape(_text(entry))
    if isinstance(entry, Link):
        text = f"<a href='{html.escape(entry.url)}'>{text}</a>"
    text = ("{}", "<u>{}</u>", "<b>{}</b>")[_weight(entry)].format(text)
    return f"<td{' class=text' if isinstance(entry, str | Link) else ''}>{text}</td>"


def _latex_row(entries: Iterable[str]) -> str:
    return " & ".join(entries) + r" \\"
