"""Somebody waits for the answer: the official SDK against a whole service, and what dies while it reads along."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionChunk

from jobs.models import Job, LedgerEntry
from jobs.states import JobState
from tests.support.press import MODEL, START_SECONDS, Press
from tests.support.waiting import wait_until

CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "You write."},
        {"role": "user", "content": "A line about rain."},
    ],
    "seed": 11,
    "temperature": 1.0,
    "max_tokens": 60,
    "extra_body": {"ignore_eos": True},
}
LONG = CHAT | {"max_tokens": 1200}
FAR = 200  # characters of a long text: it is in mid-generation


@pytest.fixture
def sdk(press: Press) -> Iterator[OpenAI]:
    press.start_workers(1, or_more=True)
    with press.openai() as client:
        yield client
    press.finish()


@functools.cache
def undisturbed(base_url: str, key: str) -> str:
    """What LONG comes to."""
    with OpenAI(base_url=base_url, api_key=key) as sdk:
        return sdk.chat.completions.create(**LONG).choices[0].message.content or ""


def expected(sdk: OpenAI) -> str:
    return undisturbed(str(sdk.base_url), sdk.api_key)


class Reader:
    """Reads a stream, a chunk at a time."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.chunks: list[ChatCompletionChunk] = []

    def read(self, num_chars: int | None = None) -> Reader:
        """On, until so many characters of the first choice are there, or to the end."""
        for chunk in self._stream:
            self.chunks.append(chunk)
            if num_chars is not None and len(self.text()) >= num_chars:
                break
        return self

    def text(self, index: int = 0) -> str:
        choices = [choice for chunk in self.chunks for choice in chunk.choices if choice.index == index]
        return "".join(choice.delta.content or "" for choice in choices)

    def reason(self, index: int = 0) -> str | None:
        choices = [choice for chunk in self.chunks for choice in chunk.choices if choice.index == index]
        assert all(choice.finish_reason is None for choice in choices[:-1])
        return choices[-1].finish_reason


def test_a_chat_and_its_stream_say_the_same(press: Press, sdk: OpenAI) -> None:
    whole = sdk.chat.completions.create(**CHAT, n=2)
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 120
    assert whole.choices[0].message.content != whole.choices[1].message.content
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    with sdk.chat.completions.create(**CHAT, n=2, **options) as stream:
        read = Reader(stream).read()
    assert [read.text(i) for i in range(2)] == [choice.message.content for choice in whole.choices]
    assert [read.reason(i) for i in range(2)] == ["length", "length"]
    *chunks, last = read.chunks
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    assert {chunk.id for chunk in read.chunks} == {last.id}
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 120
    job = press.jobs(Job.id == "job_" + last.id.removeprefix("chatcmpl-"))
    assert [row.tier for row in job.values()] == [0]


def test_a_stop_string_is_never_shown(sdk: OpenAI) -> None:
    free = sdk.chat.completions.create(**CHAT).choices[0].message.content or ""
    stop = free[30:36]
    cut = free[: free.index(stop)]
    with sdk.chat.completions.create(**CHAT, stop=[stop], stream=True) as stream:
        read = Reader(stream).read()
    assert read.text() == cut == sdk.chat.completions.create(**CHAT, stop=stop).choices[0].message.content
    assert read.reason() == "stop"


def test_text_completions(sdk: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": ["Rain "],
        "seed": 4,
        "extra_body": {"ignore_eos": True},
    }
    whole = sdk.completions.create(**asked, logprobs=2)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16
    (choice,) = whole.choices
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or ()) == len(choice.logprobs.text_offset or ()) == 16
    assert all(len(top) in (2, 3) for top in choice.logprobs.top_logprobs or ())
    with sdk.completions.create(**asked, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_models(sdk: OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == [MODEL]
    assert sdk.models.retrieve(MODEL).owned_by == "nightpress"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("some/other")


def test_what_is_wrong_raises_the_proper_class(press: Press, sdk: OpenAI) -> None:
    before = set(press.jobs())
    for change, kind, param in (
        ({"temperature": 7}, openai.BadRequestError, "temperature"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools"),
        ({"logprobs": True, "stream": True}, openai.BadRequestError, "logprobs"),
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
    ):
        with pytest.raises(kind) as caught:
            sdk.chat.completions.create(**CHAT | change)
        assert caught.value.param == param
        assert caught.value.request_id.startswith("req_")
    assert set(press.jobs()) == before
    with press.openai() as stranger, pytest.raises(openai.AuthenticationError):
        stranger.with_options(api_key="sk-no").models.list()
    too_long = CHAT | {"messages": [{"role": "user", "content": "long " * 9000}]}
    for stream in (False, True):  # what only the engine knows is a plain answer too, before a stream begins
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.chat.completions.create(**too_long, stream=stream)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.response.headers["x-should-retry"] == "false"


def test_who_leaves_cancels(press: Press, sdk: OpenAI) -> None:
    """A reader that closes its stream, and a client that does not wait any longer."""
    before = set(press.jobs())
    with sdk.chat.completions.create(**LONG | {"max_tokens": 8000}, stream=True) as stream:
        Reader(stream).read(FAR)
    with press.openai(timeout=0.7, max_retries=0) as hasty, pytest.raises(openai.APITimeoutError):
        hasty.chat.completions.create(**LONG | {"max_tokens": 8000, "seed": 3})
    left = set(press.jobs()) - before
    assert len(left) == 2
    wait_until(
        lambda: {row.state for row in press.jobs(Job.id.in_(left)).values()} == {JobState.CANCELLED},
        "both are cancelled",
        10,
    )
    with press.database.read() as connection:
        kinds = connection.execute(LedgerEntry.__table__.select().where(LedgerEntry.job_id.in_(left))).all()
    assert {row.kind for row in kinds} == {"cancelled"}


def test_the_same_key_gets_the_same_answer(press: Press, sdk: OpenAI) -> None:
    """Also after the client has left: whoever names a request comes back for it."""
    asked = LONG | {"max_tokens": 500}
    named = {"Idempotency-Key": "rain-1"}
    with sdk.chat.completions.create(**asked, stream=True, extra_headers=named) as stream:
        begun = Reader(stream).read(FAR)
    with sdk.chat.completions.create(**asked, stream=True, extra_headers=named) as stream:
        read = Reader(stream).read()
    assert read.chunks[0].id == begun.chunks[0].id
    assert read.text().startswith(begun.text())
    assert read.reason() == "length"
    with pytest.raises(openai.UnprocessableEntityError):
        sdk.chat.completions.create(**CHAT, extra_headers=named)


@pytest.mark.parametrize("disaster", ["flushed", pytest.param("killed", marks=pytest.mark.long)])
def test_redis_loses_the_rest(press: Press, sdk: OpenAI, disaster: str) -> None:
    whole = expected(sdk)
    with sdk.chat.completions.create(**LONG, stream=True) as stream:
        read = Reader(stream).read(FAR)
        (row,) = press.jobs(Job.id == "job_" + read.chunks[0].id.removeprefix("chatcmpl-")).values()
        assert row.state == JobState.IN_PROGRESS, "the text comes while it is made"
        if disaster == "flushed":
            press.flush_redis()
        else:
            press.kill_redis()
        try:
            read.read()
        finally:
            if disaster == "killed":
                press.revive_redis()
    assert read.text() == whole
    assert read.reason() == "length"


def test_the_engine_is_killed_and_the_stream_goes_on(press: Press, sdk: OpenAI) -> None:
    whole = expected(sdk)
    (worker,) = press.start_workers(1)
    row = press.worker(worker)
    assert row is not None
    with sdk.chat.completions.create(**LONG, stream=True) as stream:
        read = Reader(stream).read(FAR)
        os.kill(row["engine_pid"], signal.SIGKILL)
        read.read()
    assert read.text() == whole
    (job,) = press.jobs(Job.id == "job_" + read.chunks[0].id.removeprefix("chatcmpl-")).values()
    assert job.fence > 1


def test_a_response_in_the_background(press: Press, sdk: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "instructions": "You write.",
        "temperature": 0.0,
        "background": True,
    }
    made = sdk.responses.create(
        **asked, input="A line about rain.", max_output_tokens=20, metadata={"a": "b"}
    )
    assert made.status in ("queued", "in_progress")
    done = wait_until(
        lambda: (now := sdk.responses.retrieve(made.id)).status not in ("queued", "in_progress") and now,
        "it is done",
        START_SECONDS,
    )
    assert done.metadata == {"a": "b"}
    assert done.output_text
    assert done.usage is not None
    assert (done.status, done.usage.output_tokens) in (
        ("incomplete", 20),
        ("completed", done.usage.output_tokens),
    )
    at_once = sdk.responses.create(
        **asked | {"background": False},
        input=[{"role": "user", "content": [{"type": "input_text", "text": "A line about rain."}]}],
        max_output_tokens=20,
    )
    assert at_once.output_text == done.output_text
    long = sdk.responses.create(**asked, input="Go on.", max_output_tokens=8000)
    assert sdk.responses.cancel(long.id).status == "cancelled"
    assert sdk.responses.retrieve(long.id).status == "cancelled"
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve("resp_none")
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.responses.create(**asked, input="x", previous_response_id=made.id)
    assert caught.value.param == "previous_response_id"
