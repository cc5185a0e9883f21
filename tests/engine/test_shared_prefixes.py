"""Rows whose first pages are the same are found, with as many pages as all of them share."""

from __future__ import annotations

import random
from functools import partial
from itertools import count

from engine.shared_prefixes import Group
from engine.shared_prefixes import shared_prefixes as found_among
from kernels import Sharing

PAGE = 16
LEAST_ROWS = 4
WHOLE = 512 // PAGE  # pages of the least that is worth sharing
MOST_GROUPS = 8
shared_prefixes = partial(
    found_among,
    sharing=Sharing(least_tokens=512, least_rows=LEAST_ROWS, exact=False),
    most_groups=MOST_GROUPS,
)


def rows_on(prefix: list[int], number: int, fresh: count[int], own: int = 3) -> list[list[int]]:
    return [prefix + [next(fresh) for _ in range(own)] for _ in range(number)]


def test_rows_on_one_prefix_are_a_group() -> None:
    fresh = count(1000)
    tables = rows_on(list(range(128)), 6, fresh)
    assert shared_prefixes(tables, PAGE) == [Group([0, 1, 2, 3, 4, 5], 2048)]


def test_other_rows_stay_out() -> None:
    fresh = count(1000)
    shared = rows_on(list(range(WHOLE + 5)), 4, fresh)
    alone, short = rows_on([], 2, fresh, own=200), [[0, 1, 2], []]
    tables = [alone[0], shared[0], short[0], shared[1], shared[2], short[1], alone[1], shared[3]]
    assert shared_prefixes(tables, PAGE) == [Group([1, 3, 4, 7], (WHOLE + 5) * PAGE)]


def test_what_all_have_in_common_is_shared() -> None:
    """The second half of the rows goes on together, which is not looked for."""
    fresh = count(1000)
    prefix = list(range(100))
    tables = rows_on(prefix[:40], 4, fresh) + rows_on(prefix, 4, fresh)
    assert shared_prefixes(tables, PAGE) == [Group(list(range(8)), 40 * PAGE)]
    tables.append(prefix[:36])  # one ends within it
    assert shared_prefixes(tables, PAGE) == [Group(list(range(9)), 36 * PAGE)]


def test_rows_that_are_the_same_share_all_of_it() -> None:
    assert shared_prefixes([list(range(40))] * 5, PAGE) == [Group([0, 1, 2, 3, 4], 640)]


def test_too_few_rows_and_too_few_tokens_are_none() -> None:
    fresh = count(1000)
    assert shared_prefixes(rows_on(list(range(60)), LEAST_ROWS - 1, fresh), PAGE) == []
    assert shared_prefixes(rows_on(list(range(WHOLE - 1)), 9, fresh), PAGE) == []
    assert shared_prefixes(rows_on(list(range(WHOLE)), 9, fresh), PAGE)[0].tokens == 512
    assert shared_prefixes([], PAGE) == []


def test_a_page_in_common_behind_others_is_not_a_prefix() -> None:
    """The same page may stand behind two copies of the same tokens."""
    fresh = count(1000)
    middle = list(range(10, 200))
    tables = [[next(fresh), *middle] for _ in range(8)]
    assert shared_prefixes(tables, PAGE) == []


def test_pages_that_do_not_divide_a_split() -> None:
    fresh = count(1000)
    assert shared_prefixes(rows_on(list(range(11)), 4, fresh), 48)[0].tokens == 528
    assert shared_prefixes(rows_on(list(range(10)), 4, fresh), 48) == []


def test_those_that_save_most_come_first_and_the_others_are_left_out() -> None:
    fresh, pages = count(1000), count(10_000)
    tables: list[list[int]] = []
    for size in range(LEAST_ROWS, LEAST_ROWS + MOST_GROUPS + 3):
        tables += rows_on([next(pages) for _ in range(WHOLE)], size, fresh)
    tables += rows_on([next(pages) for _ in range(20 * WHOLE)], LEAST_ROWS, fresh)
    found = shared_prefixes(tables, PAGE)
    assert found[0].tokens == 20 * 512
    assert [len(group.rows) for group in found[1:]] == [14, 13, 12, 11, 10, 9, 8]


def test_the_kernels_say_what_is_enough() -> None:
    fresh, two = count(1000), Sharing(least_tokens=256, least_rows=2, exact=True)
    tables = [
        table for first in range(0, 400, 20) for table in rows_on(list(range(first, first + 16)), 2, fresh)
    ]
    assert len(found_among(tables, PAGE, two)) == 20
    assert found_among(rows_on(list(range(15)), 9, fresh), PAGE, two) == []
    assert found_among([*rows_on(list(range(16)), 1, fresh), []], PAGE, two) == []


def test_random_tables() -> None:
    """What is said of a group holds, and no row is in two."""
    random.seed(3)
    for _ in range(50):
        prefixes = [[random.randrange(9) for _ in range(random.randrange(60))] for _ in range(3)]
        tables = [[*random.choice(prefixes)[: random.randrange(25, 60)], n] for n in range(30)]
        found = shared_prefixes(tables, PAGE)
        rows = [row for group in found for row in group.rows]
        assert len(rows) == len(set(rows))
        for group in found:
            assert group.tokens >= 512
            assert len(group.rows) >= LEAST_ROWS
            same = group.tokens // PAGE
            assert len({tuple(tables[row][:same]) for row in group.rows}) == 1
            longer = {tuple(tables[row][: same + 1]) for row in group.rows}
            assert len(longer) > 1 or any(len(tables[row]) == same for row in group.rows)
