"""Batch files: which lines are requests, which are done, and what an answer looks like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from jobs.bad_field import BadField
from jobs.batch_file import (
    CHAT,
    COMPLETIONS,
    BadLine,
    BatchLine,
    answer_line,
    bad_line,
    error_line,
    parse_line,
)
from jobs.run_files import BatchFileError, check_input, read_lines, resume
from jobs.settings import Settings

OUTPUTS = [{"index": 0, "text": "one\u2028two", "finish_reason": "stop", "stop_reason": None}]
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def line(**change: Any) -> bytes:
    data = {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": {"prompt": "p"}} | change
    return json.dumps({name: value for name, value in data.items() if value != "absent"}).encode()


def chat(**fields: Any) -> BatchLine:
    return BatchLine(1, "a", CHAT, {"messages": [{"role": "user", "content": "hi"}], **fields})


def test_a_line_is_read() -> None:
    assert parse_line(7, line(method="absent")) == BatchLine(7, "a", COMPLETIONS, {"prompt": "p"})


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"nonsense", "JSON"),
        (b"\xff", "UTF-8"),
        (b"[]", "object"),
        (b"[" * 100_000, "nested"),
        (line(custom_id="absent"), "custom_id"),
        (line(custom_id=""), "custom_id"),
        (line(custom_id=7), "custom_id"),
        (line(custom_id="\ud800"), "custom_id"),
        (line(method="GET"), "method"),
        (line(url="absent"), "url"),
        (line(url="/v1/embeddings"), "url"),
        (line(url=["/v1/completions"]), "url"),
        (line(body="absent"), "body"),
        (line(body=[]), "body"),
        (line(extra=1), "extra"),
    ],
)
def test_a_line_that_is_no_request_says_why(raw: bytes, named: str) -> None:
    with pytest.raises(BadLine, match=named):
        parse_line(1, raw)


def test_a_body_becomes_a_job() -> None:
    job = chat(model="gpt-4o", user="u", store=True, max_completion_tokens=9, temperature=0).job(Settings())
    assert job.stored() == {
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 9,
        "temperature": 0.0,
    }


def test_a_line_may_tell_its_template_something() -> None:
    told = chat(model="m", chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    for job in (
        told.job(Settings()),
        told.named_job(Settings()),
        told.named_job(Settings(), checked=True),
    ):
        assert job.chat_template_kwargs == {"enable_thinking": False, "reasoning_effort": "low"}


def test_fields_that_are_switched_off_are_no_mistake() -> None:
    off = {
        "stream": False,
        "logprobs": None,
        "top_logprobs": 0,
        "best_of": 1,
        "tools": [],
    }
    job, plain = chat(**off).job(Settings()), chat().job(Settings())
    assert job.model_copy(update={"top_logprobs": None}) == plain
    assert job.sampling(9, 9) == plain.sampling(9, 9) == chat(logprobs=False).job(Settings()).sampling(9, 9)
    text = chat(response_format={"type": "text"}).job(Settings())
    assert text.sampling(5, 16) == plain.sampling(5, 16)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"logprobs": 0}, "logprobs"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"prompt": "p"}, "prompt"),
        ({"custom_id": "b"}, "custom_id"),
        ({"temperature": 3}, "temperature"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_field_that_means_something_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadField) as caught:
        chat(**fields).job(Settings())
    assert caught.value.param == param


def test_messages_do_not_go_to_completions() -> None:
    with pytest.raises(BadField) as caught:
        BatchLine(1, "a", COMPLETIONS, {"messages": []}).job(Settings())
    assert caught.value.param == "messages"


def test_the_input_is_counted_and_repeated_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([line(), b"", b"nonsense", b"  ", line(custom_id="b")]))
    assert check_input(path) == 3
    assert [number for number, _ in read_lines(path)] == [1, 3, 5]
    for last in (line(), line(url="/v1/embeddings")):  # which is answered under its custom_id, too
        path.write_bytes(b"\n".join([line(), line(custom_id="b"), last]))
        with pytest.raises(BatchFileError, match="lines 1 and 3: 'a'"):
            check_input(path)
    path.write_bytes(b"\xef\xbb\xbf\n")
    assert check_input(path) == 0


def test_answers_have_openais_shape() -> None:
    made = answer_line(chat(), "m", OUTPUTS, USAGE)
    assert made.isascii()
    assert made.endswith(b"\n")
    data = json.loads(made)
    assert (data["custom_id"], data["error"], data["response"]["status_code"]) == ("a", None, 200)
    answer = ChatCompletion.model_validate(data["response"]["body"])
    assert answer.choices[0].message.content == "one\u2028two"
    assert answer.choices[0].logprobs is None
    content = [{"token": "a", "bytes": [97], "logprob": -1.0, "top_logprobs": []}]
    told = [OUTPUTS[0] | {"logprobs": {"content": content, "refusal": None}}]
    data = json.loads(answer_line(chat(), "m", told, USAGE))
    logprobs = ChatCompletion.model_validate(data["response"]["body"]).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.model_dump() == told[0]["logprobs"]
    text = json.loads(answer_line(parse_line(1, line()), "m", OUTPUTS, USAGE))["response"]["body"]
    assert Completion.model_validate(text).choices[0].text == "one\u2028two"


def test_what_has_a_whole_line_is_done(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert len(resume(path)) == 0
    whole = (
        answer_line(chat(), "m", OUTPUTS, USAGE)
        + error_line(parse_line(2, line(custom_id="b")), 400, "wrong", code="invalid_value", param="n")
        + bad_line(3, BadLine("is not JSON"))
        + bad_line(4, BadLine("must be POST", param="method", custom_id="c"))
    )
    for torn in (b"", b"{", answer_line(chat(), "m", OUTPUTS, USAGE)[:-1]):
        path.write_bytes(whole + torn)
        done = resume(path)
        assert (done.custom_ids, done.bad_lines, done.num_failed) == ({"a", "b", "c"}, {3}, 3)
        assert path.read_bytes() == whole


def test_a_file_without_a_whole_line_is_not_taken_for_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_bytes(b'{"my": "only copy"}')
    with pytest.raises(BatchFileError, match="line 1"):
        resume(path)
    assert path.read_bytes() == b'{"my": "only copy"}'


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    assert parse_line(1, b"\xef\xbb\xbf" + line()).custom_id == "a"


@pytest.mark.parametrize(
    "foreign",
    [
        b'{"custom_id": "a", "response": {}, "error": null}\n',
        b"hello\n",
        b"{}\n",
        b'{"custom_id": "a"}\n',
        b"[1]\n",
        b"null\n",
    ],
)
def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path, foreign: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(foreign + b"torn")
    with pytest.raises(BatchFileError, match="line 1"):
        resume(path)
    assert path.read_bytes() == foreign + b"torn"
