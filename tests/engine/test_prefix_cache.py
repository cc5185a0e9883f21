"""What is remembered and what is given up first, on the device and in host memory, and who may find what is left."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from engine import page_names
from engine.pages import PagePool
from engine.plan import Move
from engine.prefix_cache import MIN_COPIED, SWAP_GROUP, PrefixCache
from engine.request import Request, RequestId
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.engine.test_sharing import PAGE_SIZE, finish, prompt, request
from tests.support.checked import checked_engine, expected

PAGE = 4


def memory(num_pages: int, num_host_pages: int = 0, *, keeps: bool = True) -> PrefixCache:
    return PrefixCache(PagePool(num_pages, PAGE), num_host_pages=num_host_pages, keeps=lambda: keeps)


def tokens(start: int, num_pages: int) -> tuple[int, ...]:
    return tuple(range(start, start + num_pages * PAGE))


def asking(prompt: tuple[int, ...], made: tuple[int, ...] = (), *, salt: str = "") -> Sequence:
    """It has no pages, and its last token has nothing behind it."""
    sampling = SamplingParams(seed=0)
    one = Sequence(
        Request(id=RequestId("a", 1), prompt_token_ids=prompt, sampling=sampling, cache_salt=salt), 0, 99
    )
    one.token_ids += made
    return one


def computed(cache: PrefixCache, prompt: tuple[int, ...], made: tuple[int, ...] = ()) -> Sequence:
    """One that has pages with all its tokens on them."""
    one = asking(prompt, made)
    assert cache.acquire(one, cache.match(one), len(one.token_ids))
    before, one.num_computed = one.num_computed, len(one.token_ids)
    cache.store(one, before // PAGE, one.num_computed // PAGE)
    return one


def line(cache: PrefixCache) -> list[int]:
    """What is given up, in that order."""
    cache.check()
    return list(cache.pool.coldest(cache.pool.num_pages))


def num_found(cache: PrefixCache, prompt: tuple[int, ...]) -> int:
    """How many pages of a prompt that comes now, and goes on behind it."""
    return len(cache.match(asking((*prompt, 1))).whole)


# --- what goes first ------------------------------------------------------------------------------------------


def test_of_one_that_has_ended_its_own_tokens_go_first_then_its_prompt_from_behind() -> None:
    cache = memory(8)
    one = computed(cache, tokens(0, 3), tokens(100, 2))
    pages = list(one.pages)
    cache.release(one)
    assert (one.pages, one.num_computed) == ([], 0)
    assert line(cache) == pages[::-1]


def test_what_one_made_that_has_ended_goes_before_any_prompt() -> None:
    cache = memory(8)
    old, new = computed(cache, tokens(0, 2)), computed(cache, tokens(50, 1), tokens(100, 2))
    (a, b), (c, made, more) = old.pages, new.pages
    cache.release(old)
    cache.release(new)
    assert line(cache) == [more, made, b, a, c]


def test_of_a_preempted_one_all_is_kept_and_goes_in_its_turn_from_behind() -> None:
    cache = memory(8)
    old, new = computed(cache, tokens(0, 2)), computed(cache, tokens(50, 1), (*tokens(100, 1), 7, 8))
    (a, b), (c, made, rest) = old.pages, new.pages
    cache.release(old)
    cache.release(new, preempted=True)
    assert line(cache) == [b, a, rest, made, c]


def test_the_page_where_a_prompt_ends_counts_as_the_prompts() -> None:
    cache = memory(8)
    one = computed(cache, (*tokens(0, 1), 7), (8, 9, 10, *tokens(100, 1)))
    head, both, own = one.pages
    cache.release(one)
    other = computed(cache, tokens(50, 1))
    cache.release(other)
    assert line(cache)[:3] == [own, both, head]


def test_a_prompt_that_is_asked_for_again_is_the_last_to_go() -> None:
    cache = memory(8)
    for start in (0, 50):
        cache.release(computed(cache, tokens(start, 2)))
    before = line(cache)
    cache.release(computed(cache, (*tokens(0, 2), 1)))
    assert line(cache) == before[2:] + before[:2]


def test_what_is_left_of_a_prompt_is_its_beginning() -> None:
    cache = memory(4)
    cache.release(computed(cache, tokens(0, 4)))
    for num_left in (3, 2, 1, 0):
        assert cache.pool.allocate(1) is not None
        cache.check()
        assert num_found(cache, tokens(0, 4)) == num_left


def test_too_few_pages_change_nothing() -> None:
    cache = memory(4)
    cache.release(computed(cache, tokens(0, 2)))
    held = cache.pool.allocate(1)
    one = asking((*tokens(0, 2), *tokens(50, 2)))
    before = line(cache)
    assert not cache.acquire(one, cache.match(one), len(one.token_ids)), "of four pages one is somebody's"
    assert (one.pages, one.num_computed, line(cache)) == ([], 0, before)
    cache.pool.check([held or []])


# --- what is found --------------------------------------------------------------------------------------------


def test_full_pages_are_shared_but_the_last_token_is_always_computed() -> None:
    cache = memory(8)
    first = computed(cache, tokens(0, 3))
    longer = computed(cache, (*tokens(0, 3), 99))
    assert longer.pages[:3] == first.pages
    same = cache.match(asking(tokens(0, 3)))
    assert len(same.whole) == 2
    assert same.tail is None, f"fewer than {MIN_COPIED} tokens are not copied"
    assert cache.take_moves() == ()
    cache.pool.check([first.pages, longer.pages])


def test_the_rest_of_a_preempted_one_is_copied_to_a_page_of_its_own() -> None:
    cache = PrefixCache(PagePool(6, 8))
    one = asking(tuple(range(13)))
    assert cache.acquire(one, cache.match(one), 13)
    one.num_computed = 13
    cache.store(one, 0, 1)
    before = list(one.pages)
    cache.release(one, preempted=True)
    again = asking((*range(13), 99))
    match = cache.match(again)
    assert (len(match.whole), match.tail_tokens) == (1, 5)
    assert cache.acquire(again, match, 14)
    assert again.num_computed == 13
    assert again.pages[0] == before[0]
    assert cache.take_moves() == (Move("copy", before[1], again.pages[1]),)
    assert not cache.pool.is_shared(again.pages[1])
    cache.pool.check([again.pages])


def test_the_start_of_a_page_that_is_lent_for_it_is_there_already() -> None:
    """It was evicted to make room for whoever found it: nothing is copied onto itself."""
    cache = PrefixCache(PagePool(1, 8))
    one = asking((1, 2, 3, 4, 5))
    assert cache.acquire(one, cache.match(one), 5)
    one.num_computed = 5
    cache.release(one, preempted=True)
    again = asking((1, 2, 3, 4, 5, 6))
    assert cache.acquire(again, cache.match(again), 6)
    assert (again.pages, again.num_computed, cache.take_moves()) == ([0], 5, ())
    cache.check()


def test_two_that_computed_the_same_hold_one_page_of_it() -> None:
    cache = memory(8)
    pair = [asking(tokens(0, 2)) for _ in range(2)]
    for one in pair:
        assert cache.acquire(one, cache.match(one), 2 * PAGE)
    for one in pair:
        one.num_computed = 2 * PAGE
        cache.store(one, 0, 2)
    assert pair[0].pages == pair[1].pages
    assert cache.pool.num_free == 6
    cache.pool.check([one.pages for one in pair])


def test_another_salt_finds_nothing() -> None:
    cache = memory(8)
    cache.release(computed(cache, tokens(0, 2)))
    assert len(cache.match(asking((*tokens(0, 2), 1))).whole) == 2
    assert cache.match(asking((*tokens(0, 2), 1), salt="other")) == ([], None, 0)


# --- the second level -----------------------------------------------------------------------------------------


def test_what_is_evicted_goes_to_host_memory_with_those_whose_turn_is_next() -> None:
    cache = memory(20, 20)
    one = computed(cache, tokens(0, 20))
    pages = list(one.pages)
    cache.release(one)
    assert cache.pool.allocate(1) == [pages[19]]
    moves = cache.take_moves()
    assert [(move.kind, move.source) for move in moves] == [
        ("out", page) for page in pages[::-1][:SWAP_GROUP]
    ]
    assert cache.pool.allocate(SWAP_GROUP - 1) is not None
    assert cache.take_moves() == (), "they are there already"
    assert num_found(cache, tokens(0, 20)) == 20
    again = asking((*tokens(0, 4), 1))
    assert cache.acquire(again, cache.match(again), 4 * PAGE)
    assert cache.take_moves() == (), "what is still on the device stays where it is"
    assert again.pages == pages[:4]


def test_what_comes_back_is_read_from_where_it_lies() -> None:
    cache = memory(2, 4)
    one = computed(cache, tokens(0, 2))
    pages = list(one.pages)
    cache.release(one)
    cache.release(computed(cache, tokens(50, 2)))
    slots = {source: target for _, source, target in cache.take_moves()}
    assert slots.keys() == set(pages)
    again = asking((*tokens(0, 2), 1))
    assert cache.acquire(again, cache.match(again), 2 * PAGE)
    assert again.num_computed == 2 * PAGE
    *out, first, second = cache.take_moves()
    assert [move.kind for move in out] == ["out", "out"]
    assert first == Move("in", slots[pages[0]], again.pages[0])
    assert second == Move("in", slots[pages[1]], again.pages[1])


def test_an_answer_is_not_worth_host_memory() -> None:
    cache = memory(4, 4)
    cache.release(computed(cache, tokens(0, 2), tokens(100, 2)))
    assert cache.pool.allocate(2) is not None
    assert cache.take_moves() == ()
    assert cache.pool.allocate(1) is not None
    assert len(cache.take_moves()) == 2
    assert num_found(cache, (*tokens(0, 2), *tokens(100, 2))) == 2


def test_nothing_goes_out_where_to_compute_it_again_is_cheaper() -> None:
    cache = memory(2, 4, keeps=False)
    cache.release(computed(cache, tokens(0, 2)))
    assert cache.pool.allocate(2) is not None
    assert cache.take_moves() == ()
    assert num_found(cache, tokens(0, 2)) == 0


def test_in_host_memory_the_least_recently_used_goes_first() -> None:
    cache = memory(1, 3)
    prompts = [tokens(start, 1) for start in (0, 50, 100, 150, 200)]
    for one in prompts[:3]:  # each evicts the one before
        cache.release(computed(cache, one))
    again = asking((*prompts[0], 1))
    assert cache.acquire(again, cache.match(again), PAGE)
    cache.release(again)
    for one in prompts[3:]:
        cache.release(computed(cache, one))
    cache.check()
    assert [num_found(cache, one) for one in prompts] == [1, 0, 1, 1, 1]


def test_what_a_plan_will_read_is_not_overwritten_by_what_makes_way_for_it() -> None:
    cache = memory(1, 1)
    for start in (0, 50):
        cache.release(computed(cache, tokens(start, 1)))
    cache.take_moves()
    again = asking((*tokens(0, 1), 1))
    assert cache.acquire(again, cache.match(again), PAGE)
    cache.check()
    assert [move.kind for move in cache.take_moves()] == ["in"]
    assert (num_found(cache, tokens(0, 1)), num_found(cache, tokens(50, 1))) == (1, 0)


def test_a_long_sequence_comes_back_in_time_that_grows_with_its_pages_alone() -> None:
    """Its own slots, mostly the least recently used, were passed over again at each eviction."""

    def lines_run(num_pages: int) -> int:
        cache, ran = memory(num_pages, 2 * num_pages), 0
        for start in (0, 1, 2):  # the first two lie in host memory, which is full
            cache.release(computed(cache, tokens(10_000 * start, num_pages)))
        again = asking((*tokens(0, num_pages), 1))
        match = cache.match(again)

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal ran
            ran += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            assert cache.acquire(again, match, num_pages * PAGE)
        finally:
            sys.settrace(before)
        assert sum(move.kind == "in" for move in cache.take_moves()) == num_pages
        cache.check()
        return ran

    assert lines_run(256) < 3 * lines_run(128)


# --- who finds nothing ----------------------------------------------------------------------------------------


@pytest.fixture
def one_digest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All contents get the same name."""
    digest = SimpleNamespace(digest=lambda: bytes(32))
    page_names._root.cache_clear()
    monkeypatch.setattr(page_names, "hashlib", SimpleNamespace(sha256=lambda data: digest))
    yield
    page_names._root.cache_clear()


@pytest.mark.usefixtures("one_digest")
def test_names_that_collide_mix_no_two_requests() -> None:
    """A page is shared only where its tokens are the same, too."""
    engine = checked_engine(100, PAGE_SIZE)
    requests = [request(f"{k}", prompt(k, 3 * PAGE_SIZE + 5), max_tokens=20) for k in range(4)]
    done = finish(engine, requests[:1]) | finish(engine, requests[1:])
    for one in requests:
        assert done[one.id.job_id].outputs[0].token_ids == expected(one, 0, 20)
        assert done[one.id.job_id].num_cached_tokens == 0


def test_without_prefix_caching_nobody_finds_anothers_pages() -> None:
    """Neither a later request nor the second sample of one; each finds its own after a preemption."""
    engine = checked_engine(100, PAGE_SIZE, enable_prefix_caching=False)
    asked = {"temperature": 1.0, "max_tokens": 3}
    engine.add(request("first", prompt(4, 40), **asked))
    engine.step()
    engine.scheduler.preempt(engine.scheduler.running[0])
    engine.step()
    more = [request("second", prompt(4, 40), **asked), request("samples", prompt(4, 40), n=2, **asked)]
    done = finish(engine, more)
    assert [one.num_cached_tokens for one in done.values()] == [0, 0, 0]
    stats = engine.stats()
    assert (stats["num_computed_tokens"], stats["num_recomputed_tokens"]) == (4 * 42, 0)
