"""Which rows of a batch begin with the same pages, so that all of them attend to that beginning at once.

In: the pages of each row. Out: Prefixes, each with its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True)
class Prefix:
    """Pages that stand at the beginning of some rows."""

    pages: Sequence[int]
    rows: Sequence[int]


def shared_prefixes(beginnings: Sequence[Sequence[int]]) -> list[Prefix]:
    """Every row in one Prefix. `beginnings`: the pages of each row that may be shared.

    A row joins where the pages that it then need not read are more than those that the others must read again, and
    where at least half of each beginning is common: what is not, is read padded to the longest.
    """
    found: list[Prefix] = []
    for row in sorted(range(len(beginnings)), key=lambda row: list(beginnings[row])):
        own = beginnings[row]
        if found:
            last = found[-1]
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(last.pages, own, strict=False)))
            read_again = (len(last.rows) - 1) * (len(last.pages) - common)
            if common > read_again and 2 * common >= max(len(last.pages), len(own)):
                found[-1] = Prefix(own[:common], [*last.rows, row])
                continue
        found.append(Prefix(own, [row]))
    return found
