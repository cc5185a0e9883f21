"""What the official SDK does with files and batches, unchanged, against the running service."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion

from jobs.models import Job
from tests.support.batch_lines import CHAT, chat_line, jsonl
from tests.support.press import FINISH_SECONDS, Press
from tests.support.stories import long_jobs
from tests.support.waiting import wait_until


@pytest.fixture
def sdk(press: Press) -> Iterator[OpenAI]:
    key = press.http.headers["authorization"].removeprefix("Bearer ")
    with OpenAI(base_url=f"{press.http.base_url}/v1", api_key=key, timeout=30) as client:
        yield client


def upload(sdk: OpenAI, lines: list[dict[str, Any]], **options: Any) -> Any:
    return sdk.files.create(file=("in.jsonl", io.BytesIO(jsonl(lines))), purpose="batch", **options)


def create(sdk: OpenAI, file_id: str, **options: Any) -> Any:
    return sdk.batches.create(
        input_file_id=file_id, endpoint=CHAT, completion_window=options.pop("window", "24h"), **options
    )


def ended(sdk: OpenAI, batch_id: str) -> Any:
    def look() -> Any:
        batch = sdk.batches.retrieve(batch_id)
        over = ("completed", "failed", "cancelled", "expired")
        return batch if batch.status in over else None

    return wait_until(look, "the batch has ended", FINISH_SECONDS, interval=0.1)


def requests_of(sdk: OpenAI) -> list[str]:
    """From now on, one entry per request that is really sent."""
    sent: list[str] = []
    sdk._client.event_hooks["request"] = [lambda request: sent.append(str(request.url))]
    return sent


@pytest.mark.parametrize("count", [50, pytest.param(1_000, marks=pytest.mark.long)])
def test_many_lines_and_two_files(press: Press, sdk: OpenAI, count: int) -> None:
    press.start_workers(1, or_more=True)
    lines = [chat_line(i) for i in range(count)]
    # Right as far as anybody can tell who has no tokenizer: the worker finds it.
    lines[7]["body"]["logit_bias"] = {"99999999": 1}
    file = upload(sdk, lines, expires_after={"anchor": "created_at", "seconds": 3600})
    assert (file.object, file.purpose, file.filename, file.status) == (
        "file",
        "batch",
        "in.jsonl",
        "processed",
    )
    assert file.bytes == len(jsonl(lines))
    assert file.expires_at == file.created_at + 3600
    assert sdk.files.wait_for_processing(file.id, poll_interval=0.01) == file
    assert sdk.files.content(file.id).content == jsonl(lines)

    made = create(sdk, file.id, metadata={"night": "one"})
    assert (made.status, made.endpoint, made.completion_window) == ("validating", CHAT, "24h")
    batch = ended(sdk, made.id)
    press.accepted |= set(press.jobs(Job.batch_id == batch.id))
    assert (batch.status, batch.model, batch.metadata, batch.errors) == (
        "completed",
        "tiny",
        {"night": "one"},
        None,
    )
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (
        count,
        count - 1,
        1,
    )
    times = [
        batch.created_at,
        batch.in_progress_at,
        batch.finalizing_at,
        batch.completed_at,
        batch.expires_at,
    ]
    assert times == sorted(times)

    output = [json.loads(line) for line in sdk.files.content(batch.output_file_id).text.splitlines()]
    assert [line["custom_id"] for line in output] == [f"line-{i}" for i in range(count) if i != 7]
    answers = [ChatCompletion.model_validate(line["response"]["body"]) for line in output]
    for answer in answers:
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert isinstance(answer.choices[0].message.content, str)
    assert (
        sum(answer.usage.total_tokens for answer in answers if answer.usage) == batch.usage.total_tokens > 0
    )
    (error,) = [json.loads(line) for line in sdk.files.content(batch.error_file_id).text.splitlines()]
    assert (error["custom_id"], error["response"]["status_code"]) == ("line-7", 400)
    assert "logit_bias" in error["response"]["body"]["error"]["message"]

    assert sdk.files.retrieve(batch.output_file_id).purpose == "batch_output"
    with sdk.files.with_streaming_response.content(batch.output_file_id) as streamed:
        assert len(list(streamed.iter_lines())) == count - 1
    assert sdk.files.delete(file.id).deleted
    press.finish()


@pytest.mark.long
def test_lists_are_read_page_by_page(press: Press, sdk: OpenAI) -> None:
    press.start_workers(1, or_more=True)
    files = [upload(sdk, [chat_line(i)]).id for i in range(3)]
    batches = [create(sdk, file_id, window="background").id for file_id in files]
    listed = [file.id for file in sdk.files.list(purpose="batch", limit=2)]
    assert listed[:3] == files[::-1]
    assert len(listed) == len(set(listed))
    assert [batch.id for batch in sdk.batches.list(limit=2)][:3] == batches[::-1]
    for batch_id in batches:
        assert ended(sdk, batch_id).status == "completed"
    press.accepted |= set(press.jobs(Job.batch_id.in_(batches)))
    press.finish()


@pytest.mark.long
def test_a_running_batch_is_cancelled_and_keeps_what_was_done(press: Press, sdk: OpenAI) -> None:
    press.start_workers(1, or_more=True)
    lines = [chat_line(0)] + [
        chat_line(1 + i, max_tokens=job["max_tokens"], ignore_eos=True)
        for i, job in enumerate(long_jobs(8, 7_000))
    ]
    batch = create(sdk, upload(sdk, lines).id)
    wait_until(
        lambda: sdk.batches.retrieve(batch.id).request_counts.completed,
        "the short one is done",
        FINISH_SECONDS,
    )
    assert sdk.batches.cancel(batch.id).status == "cancelling"
    batch = ended(sdk, batch.id)
    assert (batch.status, batch.request_counts.completed) == ("cancelled", 1)
    assert json.loads(sdk.files.content(batch.output_file_id).text)["custom_id"] == "line-0"
    errors = [json.loads(line) for line in sdk.files.content(batch.error_file_id).text.splitlines()]
    assert [line["custom_id"] for line in errors] == [f"line-{i}" for i in range(1, 9)]
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    press.accepted |= set(press.jobs(Job.batch_id == batch.id))
    press.finish()


def test_wrong_inputs_raise_the_sdks_own_exceptions_and_are_sent_once(press: Press, sdk: OpenAI) -> None:
    bad = upload(sdk, [chat_line(0), chat_line(0), chat_line(1, stream=True)])
    batch = ended(sdk, create(sdk, bad.id).id)
    assert batch.status == "failed"
    assert batch.errors.object == "list"
    assert [(one.line, one.code, one.param) for one in batch.errors.data] == [
        (2, "duplicate_custom_id", "custom_id"),
        (3, "invalid_request", "body.stream"),
    ]
    good = upload(sdk, [chat_line(0)])
    waiting = create(sdk, good.id, window="background")
    press.http.post(f"/v1/batches/{waiting.id}/cancel")  # or a worker was faster
    sent = requests_of(sdk)
    calls: list[tuple[type[openai.APIStatusError], Any]] = [
        (openai.NotFoundError, lambda: sdk.files.retrieve("file-unknown")),
        (openai.NotFoundError, lambda: sdk.files.content("file-unknown")),
        (openai.NotFoundError, lambda: sdk.files.delete("file-unknown")),
        (openai.NotFoundError, lambda: sdk.batches.retrieve("batch_unknown")),
        (openai.NotFoundError, lambda: create(sdk, "file-unknown")),
        (openai.BadRequestError, lambda: create(sdk, good.id, window="soon")),
        (openai.BadRequestError, lambda: sdk.files.create(file=b"x", purpose="fine-tune")),
        (openai.BadRequestError, lambda: sdk.files.list(limit=0)),
        (openai.ConflictError, lambda: sdk.batches.cancel(batch.id)),
        (openai.AuthenticationError, lambda: sdk.with_options(api_key="np_wrong").files.list()),
    ]
    for count, (kind, call) in enumerate(calls, 1):
        with pytest.raises(kind) as caught:
            call()
        assert caught.value.request_id
        assert caught.value.code
        assert len(sent) == count, "not sent again"
    assert ended(sdk, waiting.id).status in ("cancelled", "completed")
    press.accepted |= set(press.jobs(Job.batch_id == waiting.id))
    press.finish()
