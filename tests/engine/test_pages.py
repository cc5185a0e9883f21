"""The page pool: nothing is lost, lent twice or freed twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.pages import PagePool


def test_all_or_nothing() -> None:
    pool = PagePool(4, 16)
    held = pool.allocate(3)
    assert held is not None
    assert len(held) == 3
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    pool.check([held])


def test_a_shared_page_is_free_only_when_its_last_holder_leaves() -> None:
    pool = PagePool(2, 16)
    held = pool.allocate(1)
    assert held is not None
    pool.share(held)
    pool.check([held, held])
    pool.free(held)
    assert pool.num_free == 1
    pool.check([held])
    pool.free(held)
    assert pool.num_free == 2
    pool.check([])


def test_misuse_is_refused() -> None:
    pool = PagePool(2, 16)
    with pytest.raises(ValueError, match="free already"):
        pool.free([0])
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.share([1])
    with pytest.raises(ValueError, match="at least one"):
        PagePool(0, 16)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert PagePool(1, 16).pages_for(tokens) == pages


def test_check_sees_every_kind_of_damage() -> None:
    pool = PagePool(3, 16)
    held = pool.allocate(2)
    assert held is not None
    pool.check([held])
    for wrong in ([], [held[:1]], [held, held], [[held[0], held[0]]], [[*held, 2]]):
        with pytest.raises(AssertionError):
            pool.check(wrong)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "share", "drop"]), st.integers(0, 6)), max_size=60))
def test_any_history_keeps_the_invariant(history: list[tuple[str, int]]) -> None:
    pool = PagePool(8, 16)
    held: list[list[int]] = []
    for action, number in history:
        if action == "take":
            pages = pool.allocate(number)
            assert (pages is None) == (number > 8 - len({page for one in held for page in one}))
            if pages is not None:
                held.append(pages)
        elif held:
            chosen = held[number % len(held)]
            if action == "share":
                pool.share(chosen)
                held.append(list(chosen))
            else:
                held.remove(chosen)
                pool.free(chosen)
        pool.check(held)


def test_free_pages_are_lent_first_then_the_coldest() -> None:
    """Whoever is evicted is told of before its page is lent, and is not remembered any more."""
    evicted: list[int] = []
    pool = PagePool(5, 16, on_evict=evicted.append)
    held = pool.allocate(4)
    assert held == [0, 1, 2, 3]
    for page in (2, 0, 1):
        pool.remember(page)
    pool.free([2])
    pool.free([0, 1])
    assert list(pool.coldest(9)) == [2, 0, 1]
    assert list(pool.coldest(2)) == [2, 0]
    assert (pool.num_free, pool.num_cached, pool.num_owned) == (1, 3, 1)
    assert pool.allocate(1) == [4]
    assert evicted == []
    assert pool.allocate(2) == [2, 0]
    assert evicted == [2, 0]
    pool.check([[3], [4], [2, 0]])
    pool.free([2, 0])
    assert (pool.num_free, pool.num_cached) == (2, 1)


def test_cold_pages_go_before_all_others_the_last_of_them_first() -> None:
    pool = PagePool(4, 16)
    pages = pool.allocate(4) or []
    for page in pages:
        pool.remember(page)
    pool.free(pages[:2])
    pool.free(pages[2:], cold=True)
    assert list(pool.coldest(4)) == [3, 2, 0, 1]


def test_a_cached_page_that_is_shared_again_is_hot_afterwards() -> None:
    pool = PagePool(3, 16)
    pages = pool.allocate(3) or []
    for page in pages:
        pool.remember(page)
    pool.free(pages)
    pool.share([0])
    assert list(pool.coldest(3)) == [1, 2], "what is owned is in no line"
    assert pool.allocate(3) is None
    pool.check([[0]])
    pool.free([0])
    assert list(pool.coldest(3)) == [1, 2, 0]
    pool.forget(1)
    assert (pool.num_free, list(pool.coldest(3))) == (1, [2, 0])
    pool.check([])
