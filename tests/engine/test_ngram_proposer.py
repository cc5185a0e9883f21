"""What one sequence proposes: looked up among its own tokens, adapted to what was accepted."""

from __future__ import annotations

import random
from itertools import pairwise

from engine.ngram_proposer import FIRST, REST, SIZES, NgramProposer


def looked_up(token_ids: list[int], count: int) -> tuple[int, ...]:
    """The same without an index."""
    for size in SIZES:
        for end in range(len(token_ids) - 1, size - 1, -1):
            if token_ids[end - size : end] == token_ids[-size:] and len(token_ids) >= size:
                period = len(token_ids) - end
                return tuple(token_ids[end + i % period] for i in range(count))
    return ()


def test_what_stood_behind_the_last_tokens_before() -> None:
    assert NgramProposer().propose([7, 8, 9, 10, 11, 1, 7, 8], 3) == (9, 10, 11)
    assert NgramProposer().propose([1, 2, 3, 4, 5], 3) == ()
    assert NgramProposer().propose([5], 3) == ()
    assert NgramProposer().propose([], 3) == ()
    assert NgramProposer().propose([7, 8, 9, 7, 8], 0) == ()


def test_the_longest_decides_then_the_last() -> None:
    assert NgramProposer().propose([1, 2, 3, 50, 2, 3, 60, 1, 2, 3], 1) == (50,)
    assert NgramProposer().propose([2, 3, 50, 2, 3, 60, 9, 2, 3], 1) == (60,)


def test_a_loop_is_taken_to_go_on() -> None:
    assert NgramProposer().propose([9, 5, 5, 5], 4) == (5, 5, 5, 5)
    assert NgramProposer().propose([9, 1, 2, 3, 1, 2, 3], 4) == (1, 2, 3, 1)


def test_an_index_that_grows_equals_a_search() -> None:
    rng = random.Random(3)
    proposer, tokens = NgramProposer(), list[int]()
    found = 0
    for _ in range(600):
        tokens += [rng.randrange(6) for _ in range(rng.choice((1, 1, 2, 5)))]
        proposed = proposer.propose(tokens, FIRST)
        assert proposed == looked_up(tokens, FIRST)
        found += bool(proposed)
    assert found > 500


def test_the_number_follows_what_is_accepted() -> None:
    proposer, tokens = NgramProposer(), [5] * 20
    assert len(proposer.propose(tokens, 100)) == FIRST
    proposer.observe(20, FIRST, FIRST)
    assert len(proposer.propose(tokens, 100)) == 2 * FIRST
    assert len(proposer.propose(tokens, 3)) == 3
    proposer.observe(20, 3, 3)  # the room decided, not the proposer
    assert len(proposer.propose(tokens, 100)) == 2 * FIRST
    proposer.observe(20, 2 * FIRST, 2)
    assert len(proposer.propose(tokens, 100)) == 3
    proposer.observe(20, 3, 0)
    assert len(proposer.propose(tokens, 100)) == 1
    proposer.observe(20, 1, 0)
    assert len(proposer.propose(tokens, 100)) == 1


def test_who_is_guessed_badly_rests_longer_each_time() -> None:
    proposer, tokens = NgramProposer(), [5] * 4
    tries: list[int] = []
    while len(tokens) < 1000:
        proposed = proposer.propose(tokens, 4)
        tokens.append(5)
        if proposed:
            tries.append(len(tokens))
            proposer.observe(len(tokens), len(proposed), 0)
    assert len(tries) < 40
    rests = [b - a for a, b in pairwise(tries) if b - a > 1]
    assert rests[0] >= REST
    assert all(b >= 2 * a - 2 for a, b in pairwise(rests))
