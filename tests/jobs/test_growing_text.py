"""GrowingSample: whatever is shown is in the answer, in its place, and is shown as soon as that is certain."""

from __future__ import annotations

import random

import pytest

from engine.reasoning import format_of, told
from engine.request import Output
from engine.special_tokens import SpecialTokens
from engine.stop import StopChecker
from engine.tokenizer import Tokenizer
from jobs.growing_text import GrowingSample
from tests.support.thinking import THINK, with_marks
from tests.support.tiny_tokenizers import KINDS


@pytest.fixture(scope="module", params=["byte-level", "pieces, first", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(KINDS[request.param]().to_str(), template=None, special_tokens=SpecialTokens())


def shown(text: GrowingSample) -> str:
    return text.answer.read(0)


@pytest.mark.parametrize("stop", [(), ("he",), ("the fox", "x", "oxo"), ("�",), ("aab", "abaa")])
def test_what_is_shown_is_in_the_answer(tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    """Random tokens, bytes of broken characters and control tokens among them, up to the first stop string."""
    draw = random.Random(5)
    words = tokenizer.encode_part("the fox he x aab abaa oxo ")
    for _ in range(200):
        text, checker = GrowingSample(tokenizer, stop), StopChecker(tokenizer, stop) if stop else None
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


@pytest.mark.parametrize("stop", [(), ("fox",), ("x", "aab")])
@pytest.mark.parametrize("kind", ["byte-level", "pieces, first", "unigram"])
def test_what_is_shown_of_a_thinking_sample_is_in_its_result(kind: str, stop: tuple[str, ...]) -> None:
    """Random tokens, marks and white space among them, that come in pieces of any size, some of them twice."""
    made = with_marks(KINDS[kind](), THINK, special=False)
    tokenizer = Tokenizer(made.to_str(), template=None, special_tokens=SpecialTokens())
    form = format_of(tokenizer, "think")
    assert form is not None
    draw = random.Random(7)
    words = tokenizer.encode_part("the fox he x aab \n ")
    words += [token_id for mark in THINK if (token_id := tokenizer.id_of(mark)) is not None]
    num_both = 0
    for _ in range(200):
        ids = [draw.choice(words) for _ in range(40)]
        checker = StopChecker(tokenizer, stop, 0, form.splitter("reasoning")) if stop else None
        match = next((m for one in ids if checker and (m := checker.push(one))), None)
        ids = ids[: match.num_tokens] if match else ids
        cut = match.text_cut if match else None
        said = told(
            Output(token_ids=tuple(ids), finish_reason="length", begins="reasoning", text_cut=cut),
            tokenizer,
            form,
        )
        sample = GrowingSample(tokenizer, stop, form.splitter("reasoning"))
        at, shown = 0, ("", "")
        while at < len(ids) - bool(match):  # how a sample ends, its result says
            end = min(at + draw.randrange(1, 6), len(ids) - bool(match))
            start = max(0, at - draw.randrange(3))
            sample.push(start, ids[start:end])
            at = end
            now = sample.reasoning.read(0), sample.answer.read(0)
            assert all(new.startswith(old) for new, old in zip(now, shown, strict=True))
            shown = now
            assert (said.reasoning or "").startswith(now[0])
            assert said.text.startswith(now[1])
        if kind == "byte-level" and not stop:  # others hold back bytes until their run has ended
            assert shown == (said.reasoning or "", said.text)
        num_both += all(shown)
    assert num_both > 20


def test_nothing_is_held_back_without_need(tokenizer: Tokenizer) -> None:
    text = GrowingSample(tokenizer, ("fog",))
    made = tokenizer.encode_part("the fox")
    for place, token_id in enumerate(made):
        text.push(place, [token_id])
        assert shown(text) == tokenizer.decode(made[: place + 1]).removesuffix("fo").removesuffix("f")


def test_a_character_comes_when_it_is_whole(tokenizer: Tokenizer) -> None:
    text = GrowingSample(tokenizer)
    made = tokenizer.encode_part("ox→ox")  # whose arrow is three bytes for all of these
    seen = []
    for place, token_id in enumerate(made):
        text.push(place, [token_id])
        seen.append(shown(text))
    assert not any("�" in one for one in seen)
    assert seen[-1].endswith("→ox")


def test_tokens_that_come_again_or_too_late_change_nothing(tokenizer: Tokenizer) -> None:
    made = tokenizer.encode_part("the fox the fox")
    text = GrowingSample(tokenizer)
    text.push(0, made[:4])
    text.push(2, made[2:6])
    text.push(1, made[1:3])
    assert shown(text) == tokenizer.decode(made[:6])
    text.push(7, made[7:])  # the sixth is missing
    assert shown(text) == tokenizer.decode(made[:6])
    assert text.answer.read(3) == tokenizer.decode(made[:6])[3:]
