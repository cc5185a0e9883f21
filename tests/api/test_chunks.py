"""Streamed answers: what the official SDK's types read, and where each piece of text belongs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from api.chunks import DONE, KEEP_ALIVE, Chunks
from api.waits import DivergedError, Transcript
from jobs.audience import Piece
from jobs.openai_body import CHAT, COMPLETIONS

USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
OUTPUT = {"index": 1, "text": "ab", "finish_reason": "stop", "stop_reason": "\n"}


def made(url: Any, *, include_usage: bool = False) -> tuple[Chunks, list[dict[str, Any]]]:
    chunks = Chunks(url=url, answer_id="x-1", created=7, model="m", include_usage=include_usage)
    whole = chunks.opening(2) + chunks.text(1, "a\u2028\n") + chunks.end(OUTPUT) + chunks.closing(USAGE)
    events = whole.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert all(one.startswith(b"data: ") and b"\n" not in one for one in events[:-1])
    return chunks, [json.loads(one.removeprefix(b"data: ")) for one in events[:-2]]


def test_a_chat_in_chunks() -> None:
    _, events = made(CHAT)
    first, second, text, end = [ChatCompletionChunk.model_validate(one) for one in events]
    assert [(one.choices[0].index, one.choices[0].delta.role) for one in (first, second)] == [
        (0, "assistant"),
        (1, "assistant"),
    ]
    assert text.choices[0].delta.to_dict() == {"content": "a\u2028\n"}
    assert (end.choices[0].index, end.choices[0].finish_reason) == (1, "stop")
    assert end.choices[0].delta.to_dict() == {}
    assert {(one.id, one.created, one.model) for one in (first, text, end)} == {("x-1", 7, "m")}
    assert not any("usage" in one for one in events)


def test_a_text_in_chunks() -> None:
    _, events = made(COMPLETIONS)
    text, end = [Completion.construct(**one) for one in events]  # as the SDK reads a stream
    Completion.model_validate(events[-1])
    assert (text.choices[0].text, text.choices[0].index) == ("a\u2028\n", 1)
    assert (end.choices[0].text, end.choices[0].finish_reason) == ("", "stop")
    assert text.object == "text_completion"


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_usage_comes_last_and_alone(url: str) -> None:
    _, events = made(url, include_usage=True)
    assert [one["usage"] for one in events[:-1]] == [None] * (len(events) - 1)
    assert (events[-1]["choices"], events[-1]["usage"]) == ([], USAGE)


def test_words_between_chunks() -> None:
    assert KEEP_ALIVE.startswith(b":")  # a comment, which every reader passes over
    assert KEEP_ALIVE.endswith(b"\n\n")
    assert DONE == b"data: [DONE]\n\n"


def test_each_character_is_sent_once() -> None:
    sent = Transcript(2)
    assert sent.take(Piece(0, 0, "abc")) == "abc"
    assert sent.take(Piece(1, 0, "x")) == "x"
    assert sent.take(Piece(0, 0, "ab")) == ""  # said before
    assert sent.take(Piece(0, 1, "bcd")) == "d"  # in part
    assert sent.take(Piece(0, 9, "z")) == ""  # something is missing before it
    assert sent.take(Piece(2, 0, "z")) == ""  # no such sample
    assert sent.take(Piece(-1, 0, "z")) == ""
    assert sent.take(Piece(0, 4, "ef")) == "ef"
    assert sent.rest(0, "abcdefghi") == "ghi"
    assert sent.rest(0, "abcdefghi") == ""
    assert sent.rest(1, "x") == ""


def test_a_result_that_is_another_one_is_noticed() -> None:
    sent = Transcript(1)
    sent.take(Piece(0, 0, "abc"))
    for other in ("abX and more", "ab"):
        with pytest.raises(DivergedError):
            sent.rest(0, other)


def test_thoughts_have_places_of_their_own() -> None:
    sent = Transcript(1)
    assert [
        sent.take(Piece(0, 0, "hm", True)),
        sent.take(Piece(0, 0, "so")),
        sent.take(Piece(0, 1, "m!", True)),
    ] == [
        "hm",
        "so",
        "!",
    ]
    assert sent.rest(0, "hm! yes", is_reasoning=True) == " yes"
    assert sent.rest(0, "so.") == "."
    with pytest.raises(DivergedError):
        sent.rest(0, "hm? yes", is_reasoning=True)
