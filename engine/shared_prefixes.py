"""Which rows of a step share the pages of a prefix, so that attention may read them once for all of them.

Owns that choice, from page numbers alone: rows whose first pages are the same are a group, and share as many as all
of them have in common. A group within a group is not looked for. Knows no tensors (`decode_steps` makes them) and not
why pages are shared (`prefix_cache`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

LEAST_TOKENS = 512  # attention takes contexts in splits, the first ones this long, and shares only whole ones
LEAST_ROWS = 4
MOST_GROUPS = 8


class Group(NamedTuple):
    """`rows`, by their index, begin with the same `tokens` tokens in the same pages."""

    rows: list[int]
    tokens: int


def shared_prefixes(tables: Sequence[list[int]], page_size: int) -> list[Group]:
    """At most `MOST_GROUPS`, those that save most first. `tables`: the pages of each row, in order; a row is in one
    group at most."""
    least = -(-LEAST_TOKENS // page_size)
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, pages in enumerate(tables):
        if len(pages) >= least:
            alike[tuple(pages[:least])].append(row)
    groups = [
        Group(rows, _common([tables[row] for row in rows]) * page_size)
        for rows in alike.values()
        if len(rows) >= LEAST_ROWS
    ]
    groups.sort(key=lambda group: (len(group.rows) - 1) * group.tokens, reverse=True)
    return groups[:MOST_GROUPS]


def _common(tables: list[list[int]]) -> int:
    """How many first pages all have in common: as many as the least and the greatest of them, in their order."""
    low, high = min(tables), max(tables)
    pairs = enumerate(zip(low, high, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(low), len(high)))
