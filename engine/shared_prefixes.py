"""Which rows of a step share the pages of a prefix, so that attention may read them once for all of them.

Owns that choice, from page numbers alone: rows whose first pages are the same are a group, and share as many as all
of them have in common. A group within a group is not looked for. From how many rows and tokens on it pays is the
kernels' word (`Sharing`). Knows no tensors (`decode_inputs` and `step_input` make them) and not why pages are shared
(`prefix_cache`).

It is asked at every step and believes nothing of the step before, since preemption and sharing change pages. So it
must be cheap: rows that differ from all others in their first page, as most do, are not looked at any further.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from kernels import Sharing


class Group(NamedTuple):
    """`rows`, by their index, begin with the same `tokens` tokens in the same pages."""

    rows: list[int]
    tokens: int


def shared_prefixes(
    tables: Sequence[Sequence[int]], page_size: int, sharing: Sharing, *, most_groups: int | None = None
) -> list[Group]:
    """At most `most_groups`, those that save most first. `tables`: the pages of each row, in order, none of one that
    cannot share; a row is in one group at most."""
    least = -(-sharing.least_tokens // page_size)
    near: dict[int, list[int]] = defaultdict(list)
    for row, pages in enumerate(tables):
        if len(pages) >= least:
            near[pages[0]].append(row)
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rows in near.values():
        if len(rows) >= sharing.least_rows:
            for row in rows:
                alike[tuple(tables[row][:least])].append(row)
    groups = [
        Group(rows, _common([tables[row] for row in rows]) * page_size)
        for rows in alike.values()
        if len(rows) >= sharing.least_rows
    ]
    groups.sort(key=lambda group: (len(group.rows) - 1) * group.tokens, reverse=True)
    return groups[:most_groups]


def _common(tables: list[Sequence[int]]) -> int:
    """How many first pages all have in common."""
    first = tables[0]
    count = min(map(len, tables))
    same = first[:count]
    for table in tables:
        if table[:count] != same:
            count = next(i for i, (one, other) in enumerate(zip(table, same, strict=False)) if one != other)
            same = first[:count]
    return count
