"""What the doctor reports: one Finding for each check, as a table, as JSON and as an exit code.

In: the outcome of a check. Out: Findings for people and for programs.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table


Level = Literal["ok", "warn", "fail"]
ORDER = {"fail": 0, "warn": 1, "ok": 2}
COLOURS = {"ok": "dim", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check on one node, on a pair of nodes (`a > b`) or on all of them."""

    name: str
    node: str
    level: Level
    found: str
    expected: str = ""
    remedy: str = ""


def ok(name: str, node: str, found: str) -> Finding:
    """A check that found nothing wrong."""
    return Finding(name, node, "ok", found)


def graded(name: str, node: str, level: Level, found: str, expected: str, remedy: str) -> Finding:
    """A finding of any level. Where nothing is wrong, nothing is expected and there is no remedy."""
    return ok(name, node, found) if level == "ok" else Finding(name, node, level, found, expected, remedy)


def findings_table(findings: Sequence[Finding]) -> "Table":
    """A table with one row for each finding; what is well is dim."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "check", "node", "found", "expected", "remedy"):
        table.add_column(column, overflow="fold")
    for f in findings:
        cells = (f.level, f.name, f.node, f.found, f.expected, f.remedy)
        table.add_row(*(f"[{COLOURS[f.level]}]{escape(text)}[/]" for text in cells))
    return table


def findings_json(findings: Sequence[Finding]) -> str:
    """A list of objects with name, node, level, found, expected and remedy."""
    return json.dumps([asdict(f) for f in findings], indent=1)


def exit_code(findings: Sequence[Finding]) -> int:
    """1 where something fails, else 0."""
    return int(any(f.level == "fail" for f in findings))
