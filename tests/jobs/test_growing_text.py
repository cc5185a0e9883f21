"""GrowingText: whatever is shown is in the answer, in its place, and is shown as soon as that is certain."""

from __future__ import annotations

import random

import pytest

from engine.special_tokens import SpecialTokens
from engine.stop import StopChecker
from engine.tokenizer import Tokenizer
from jobs.growing_text import GrowingText
from tests.support.tiny_tokenizers import KINDS


@pytest.fixture(scope="module", params=["byte-level", "pieces, first", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(KINDS[request.param]().to_str(), template=None, special_tokens=SpecialTokens())


def shown(text: GrowingText) -> str:
    return text.read(0)


@pytest.mark.parametrize("stop", [(), ("he",), ("the fox", "x", "oxo"), ("�",), ("aab", "abaa")])
def test_what_is_shown_is_in_the_answer(tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    """Random tokens, bytes of broken characters and control tokens among them, up to the first stop string."""
    draw = random.Random(5)
    words = tokenizer.encode_part("the fox he x aab abaa oxo ")
    for _ in range(200):
        text, checker = GrowingText(tokenizer, stop), StopChecker(tokenizer, stop) if stop else None
        made: list[int] = []
        seen = ""
        cut = None
        while len(made) < 25:
            made.append(draw.choice(words) if draw.random() < 0.6 else draw.randrange(tokenizer.vocab_size))
            match = checker.push(made[-1]) if checker else None
            if match is not None:
                cut = match.text_cut
                break
            text.push(len(made) - 1, made[-1:])
            assert shown(text).startswith(seen)
            seen = shown(text)
        final = tokenizer.decode(made)[:cut]
        assert final.startswith(seen)


def test_nothing_is_held_back_without_need(tokenizer: Tokenizer) -> None:
    text = GrowingText(tokenizer, ("fog",))
    made = tokenizer.encode_part("the fox")
    for place, token_id in enumerate(made):
        text.push(place, [token_id])
        assert shown(text) == tokenizer.decode(made[: place + 1]).removesuffix("fo").removesuffix("f")


def test_a_character_comes_when_it_is_whole(tokenizer: Tokenizer) -> None:
    text = GrowingText(tokenizer)
    made = tokenizer.encode_part("ox→ox")  # whose arrow is three bytes for all of these
    seen = []
    for place, token_id in enumerate(made):
        text.push(place, [token_id])
        seen.append(shown(text))
    assert not any("�" in one for one in seen)
    assert seen[-1].endswith("→ox")


def test_tokens_that_come_again_or_too_late_change_nothing(tokenizer: Tokenizer) -> None:
    made = tokenizer.encode_part("the fox the fox")
    text = GrowingText(tokenizer)
    text.push(0, made[:4])
    text.push(2, made[2:6])
    text.push(1, made[1:3])
    assert shown(text) == tokenizer.decode(made[:6])
    text.push(7, made[7:])  # the sixth is missing
    assert shown(text) == tokenizer.decode(made[:6])
    assert text.read(3) == tokenizer.decode(made[:6])[3:]
