"""Stop strings: found however tokens split them, cut where they begin, never before min_tokens."""

from __future__ import annotations

import random

import pytest

from engine.checkpoint import Checkpoint
from engine.stop import StopChecker, StopMatch
from engine.tokenizer import Tokenizer
from tests.support.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.open(Checkpoint.open(str(write_tiny_llama(tmp_path_factory.mktemp("tiny")))))


def run(
    tokenizer: Tokenizer, token_ids: list[int], stop: tuple[str, ...], min_tokens: int = 0
) -> tuple[StopMatch | None, int]:
    """(the match, tokens pushed until it)"""
    checker = StopChecker(tokenizer, stop, min_tokens)
    for count, token_id in enumerate(token_ids, 1):
        match = checker.push(token_id, last=count == len(token_ids))
        if match is not None:
            return match, count
    return None, len(token_ids)


def by_bytes(text: str) -> list[int]:
    """One token per byte, so that every string is split over tokens."""
    from engine.tokenizer import _BYTE_OF_CHAR

    char = {byte: char for char, byte in _BYTE_OF_CHAR.items()}
    return [_ID[char[byte]] for byte in text.encode()]


_ID: dict[str, int] = {}


@pytest.fixture(autouse=True)
def _ids(tokenizer: Tokenizer) -> None:
    _ID.update(tokenizer._backend.get_vocab())


def test_a_stop_string_over_several_tokens(tokenizer: Tokenizer) -> None:
    match, count = run(tokenizer, by_bytes("one END two"), ("END",))
    assert match == StopMatch("END", 7, 4)
    assert count == 7


def test_the_first_one_wins(tokenizer: Tokenizer) -> None:
    match, _ = run(tokenizer, by_bytes("abcd"), ("d", "bc", "x"))
    assert match == StopMatch("bc", 3, 1)


def test_two_in_one_token_cut_at_the_earlier(tokenizer: Tokenizer) -> None:
    ing = tokenizer.encode("ing")
    assert len(ing) == 1
    match, _ = run(tokenizer, ing, ("g", "n"))
    assert match == StopMatch("n", 1, 1)


def test_text_behind_a_stop_inside_its_token_is_cut(tokenizer: Tokenizer) -> None:
    match, _ = run(tokenizer, [*by_bytes("a"), *tokenizer.encode("ing")], ("ai",))
    assert match == StopMatch("ai", 2, 0)


def test_beginnings_that_lead_nowhere_do_not_match(tokenizer: Tokenizer) -> None:
    assert run(tokenizer, by_bytes("ENEN-DEN"), ("END",)) == (None, 8)
    match, _ = run(tokenizer, by_bytes("ENEND"), ("END",))
    assert match == StopMatch("END", 5, 2)


def test_characters_of_several_tokens(tokenizer: Tokenizer) -> None:
    text = "é🙂STOP"
    match, count = run(tokenizer, by_bytes(text) + by_bytes("é"), ("🙂S",))
    assert match == StopMatch("🙂S", 7, 1)
    assert count == 7


def test_not_before_min_tokens(tokenizer: Tokenizer) -> None:
    match, _ = run(tokenizer, by_bytes("x.x.x"), (".",), min_tokens=3)
    assert match == StopMatch(".", 4, 3)
    match, _ = run(tokenizer, by_bytes("x.x.x"), (".",), min_tokens=4)
    assert match == StopMatch(".", 4, 3)
    assert run(tokenizer, by_bytes("x.x.x"), (".",), min_tokens=5) == (None, 5)


def test_control_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    token_ids = [*by_bytes("a"), 1, *by_bytes("b")]
    match, _ = run(tokenizer, token_ids, ("ab",))
    assert match == StopMatch("ab", 3, 0)
    assert run(tokenizer, [1, 2], ("<|im_end|>",)) == (None, 2)


def test_agrees_with_searching_the_whole_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    hits = 0
    for _ in range(400):
        token_ids = by_bytes("".join(rng.choices("abcé🙂", k=rng.randrange(1, 30))))
        stop = tuple(
            "".join(rng.choices("abcé🙂", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))
        )
        match, _ = run(tokenizer, token_ids, stop)
        expected = next(
            (
                StopMatch(first, count, text.find(first))
                for count in range(1, len(token_ids) + 1)
                for text in [tokenizer.decode(token_ids[:count])]
                for first in sorted(
                    (one for one in stop if one in text), key=lambda one: (text.find(one), one)
                )
            ),
            None,
        )
        assert match == expected
        hits += match is not None
    assert 100 < hits < 400
