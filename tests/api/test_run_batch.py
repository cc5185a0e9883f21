"""run-batch with a real engine: every request answered once, whatever dies in between."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from openai.types.chat import ChatCompletion

from api.cli import main
from tests.support.processes import Process
from tests.support.thinking import CLOSE_ID, write_thinking_llama
from tests.support.tiny import CHAT_TEMPLATE, write_tiny_llama
from tests.support.waiting import wait_until

ENVIRONMENT = {
    "NIGHTPRESS_ENGINE__DEVICE": "cpu",
    "NIGHTPRESS_ENGINE__DTYPE": "float32",
    "NIGHTPRESS_ENGINE__THREADS": "1",
    "NIGHTPRESS_ENGINE__MAX_NUM_SEQS": "2",
    "NIGHTPRESS_ENGINE__KV_CACHE_MEMORY_BYTES": str(16 * 2**20),
}
SECONDS = 90.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_llama(folder)
    hush = "{% if enable_thinking is false %}{{ 'hush' }}{% endif %}"
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + hush)
    return folder


def requests(count: int, max_tokens: int) -> list[dict[str, Any]]:
    made = []
    for i in range(count):
        body: dict[str, Any] = {"model": "any", "max_tokens": max_tokens, "ignore_eos": True}
        if i % 2:
            body["messages"] = [{"role": "user", "content": f"number {i}"}]
        else:
            body["prompt"] = f"number {i}"
        url = "/v1/chat/completions" if i % 2 else "/v1/completions"
        made.append({"custom_id": f"r{i}", "method": "POST", "url": url, "body": body})
    return made


def start(folder: Path, model: Path, name: str = "run") -> Process:
    arguments = ["run-batch", "-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl")]
    return Process(name, [*arguments, "--model", str(model)], ENVIRONMENT, folder)


def write(folder: Path, lines: list[dict[str, Any] | str]) -> None:
    text = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    (folder / "in.jsonl").write_text("\n".join(text) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    path = folder / "out.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [json.loads(line) for line in lines[:-1]]


def engine_of(process: Process) -> int:
    """The pid of its engine process."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return wait_until(
        lambda: int((children.read_text().split() or ["0"])[0]), "an engine is started", SECONDS
    )


def test_every_line_is_answered_and_bad_ones_do_not_stop_the_rest(tmp_path: Path, model: Path) -> None:
    good = requests(6, 5)
    good[1]["body"] |= {"logprobs": True, "top_logprobs": 2}
    hushed = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    good[5]["body"] |= {"messages": good[3]["body"]["messages"], **hushed}
    bad_body = {"custom_id": "bad", "url": "/v1/completions", "body": {"prompt": "a", "temperature": 9}}
    too_long = {"custom_id": "long", "url": "/v1/completions", "body": {"prompt": "word " * 2_000}}
    choice = {"prompt": "a", "structured_outputs": {"choice": ["yes", "no"]}}
    form = {"custom_id": "form", "url": "/v1/completions", "body": choice}
    bad_form = {"custom_id": "bad form", "url": "/v1/completions", "body": {"prompt": "a"}}
    bad_form["body"] |= {"structured_outputs": {"regex": "(?=a)b"}}
    bad_url = bad_body | {"custom_id": "bad url", "url": "/v1/embeddings"}
    write(tmp_path, [*good[:3], "nonsense", bad_body, too_long, "", form, bad_form, bad_url, *good[3:]])
    process = start(tmp_path, model)
    assert process.wait(SECONDS) == 1, process.tail()
    assert "the first failure: line 4" in process.text()
    answers = {one["custom_id"]: one for one in read(tmp_path)}
    assert set(answers) == {f"r{i}" for i in range(6)} | {"bad", "long", "form", "bad form", "bad url", None}
    for i in range(6):
        body = answers[f"r{i}"]["response"]["body"]
        assert body["usage"]["completion_tokens"] == 5
        assert body["model"] == model.name
        assert body["choices"][0]["finish_reason"] == "length"
        assert ("message" if i % 2 else "text") in body["choices"][0]
        assert (body["choices"][0]["logprobs"] is not None) == (i == 1)
    plain, longer = (answers[name]["response"]["body"]["usage"]["prompt_tokens"] for name in ("r3", "r5"))
    assert longer > plain  # by what the template says of it; nobody reads the effort
    told = ChatCompletion.model_validate(answers["r1"]["response"]["body"]).choices[0]
    assert told.logprobs is not None
    assert [len(one.top_logprobs) for one in told.logprobs.content or ()] == [2] * 5
    assert answers["bad"]["response"]["status_code"] == 400
    assert answers["bad"]["response"]["body"]["error"]["param"] == "temperature"
    long = answers["long"]["response"]["body"]["error"]
    assert (long["code"], long["param"]) == ("context_length_exceeded", "prompt")
    assert answers["form"]["response"]["body"]["choices"][0]["text"] in ("yes", "no")
    assert answers["bad form"]["response"]["status_code"] == 400
    assert answers["bad form"]["response"]["body"]["error"]["param"] == "structured_outputs.regex"
    assert answers["bad url"]["error"]["code"] == "url_mismatch"
    assert (answers[None]["response"], answers[None]["error"]["line"]) == (None, 4)
    before = (tmp_path / "out.jsonl").read_bytes()
    again = start(tmp_path, model, "again")
    assert again.wait(SECONDS) == 1
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert "12 of 12 requests answered, 5 failed" in again.text()


def test_an_answer_is_without_its_thoughts(tmp_path: Path) -> None:
    model = write_thinking_llama(tmp_path / "model")
    bias = {"logit_bias": {str(CLOSE_ID): 100}, "seed": 1}
    lines = requests(2, 5)
    for line in lines:
        line["body"] |= bias
    write(tmp_path, list(lines))
    process = start(tmp_path, model)
    assert process.wait(SECONDS) == 0, process.tail()
    answers = {one["custom_id"]: one["response"]["body"] for one in read(tmp_path)}
    # In a chat the first mark ends the reasoning that its template has begun; behind a prompt it is text.
    assert answers["r1"]["choices"][0]["message"]["content"] == 4 * "</think>"
    assert answers["r0"]["choices"][0]["text"] == 5 * "</think>"


@pytest.mark.long
def test_killed_engines_interrupts_and_torn_lines_lose_and_repeat_nothing(
    tmp_path: Path, model: Path
) -> None:
    write(tmp_path, list(requests(40, 60)))
    first = start(tmp_path, model, "first")
    wait_until(lambda: len(read(tmp_path)) >= 3, "the first answers", SECONDS)
    os.kill(engine_of(first), signal.SIGKILL)
    answered = len(read(tmp_path))
    wait_until(lambda: len(read(tmp_path)) >= answered + 5, "answers of the next engine", SECONDS)
    first.signal(signal.SIGINT)
    assert first.wait(SECONDS) == 130, first.tail()
    assert "interrupted" in first.text()
    kept = read(tmp_path)
    assert len(kept) < 40
    with (tmp_path / "out.jsonl").open("ab") as file:
        file.write(b'{"id": "batch_req_torn')
    second = start(tmp_path, model, "second")
    wait_until(lambda: len(read(tmp_path)) >= len(kept) + 3, "more answers", SECONDS)
    second.kill()
    third = start(tmp_path, model, "third")
    assert third.wait(SECONDS) == 0, third.tail()
    answers = read(tmp_path)
    assert Counter(one["custom_id"] for one in answers) == Counter(f"r{i}" for i in range(40))
    assert answers[: len(kept)] == kept
    text = {one["custom_id"]: one["response"]["body"]["choices"] for one in answers}

    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole, list(requests(40, 60)))
    assert start(whole, model, "whole").wait(SECONDS) == 0
    assert {one["custom_id"]: one["response"]["body"]["choices"] for one in read(whole)} == text


@pytest.mark.parametrize(
    ("source", "target"), [("in.jsonl", "-"), ("in.jsonl", "/dev/zero"), ("/dev/null", "out")]
)
def test_what_cannot_be_read_again_is_refused(tmp_path: Path, source: str, target: str) -> None:
    """A device for output would be read for answers that are there already: `/dev/zero` has no end."""
    write(tmp_path, list(requests(1, 5)))
    arguments = ["run-batch", "-i", str(tmp_path / source), "-o", target, "--model", "none"]
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, "is no regular file" in done.output) == (2, True), done.output


def test_an_interrupted_run_says_so_and_has_a_status_of_its_own(tmp_path: Path, model: Path) -> None:
    write(tmp_path, list(requests(40, 60)))
    process = start(tmp_path, model)
    engine_of(process)
    process.signal(signal.SIGINT)
    assert process.wait(SECONDS) == 130, process.tail()
    assert "The same command goes on from here" in process.text()


def test_files_that_cannot_be_used_are_refused(tmp_path: Path, model: Path) -> None:
    twice = requests(1, 5) * 2
    write(tmp_path, list(twice))
    process = start(tmp_path, model)
    assert process.wait(SECONDS) == 1
    assert "lines 1 and 2: 'r0'" in process.text()
    write(tmp_path, list(requests(1, 5)))
    (tmp_path / "out.jsonl").write_text("a letter to my mother\n")
    process = start(tmp_path, model)
    assert process.wait(SECONDS) == 1
    assert (tmp_path / "out.jsonl").read_text() == "a letter to my mother\n"
    (tmp_path / "out.jsonl").unlink()
    process = start(tmp_path, tmp_path / "no-model")
    assert process.wait(SECONDS) == 1
    assert "no-model" in process.text()
    assert "Traceback" not in process.text().rpartition("r0")[2]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", "{", "nightpress: .*the tokenizer cannot be read"),  # told by the command itself
        ("config.json", None, r"the engine cannot start: UnsupportedCheckpoint: .*tensor .* has shape"),
    ],
)
def test_a_checkpoint_that_cannot_run_is_one_line(
    tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    folder = write_tiny_llama(tmp_path / "model", vocab_size=400)
    wider = (folder / name).read_text().replace('"hidden_size": 64', '"hidden_size": 128')
    (folder / name).write_text(wider if content is None else content)
    write(tmp_path, requests(1, 1))
    process = start(tmp_path, folder)
    assert process.wait(SECONDS) == 1
    assert re.search(says, process.text())
    assert "Traceback" not in process.text()
    assert read(tmp_path) == []
