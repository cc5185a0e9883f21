"""A model that thinks aloud, through every door: its answer is the text, and what it thought stands beside it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from jobs.models import Job
from tests.story.conftest import opened_press
from tests.support.databases import Databases
from tests.support.press import MODEL, START_SECONDS, Press
from tests.support.thinking import CLOSE_ID, write_thinking_llama
from tests.support.waiting import wait_until

ASK = [{"role": "user", "content": "A line about rain."}]
JOB: dict[str, Any] = {
    "messages": ASK,
    "max_tokens": 80,
    "temperature": 1.0,
    "ignore_eos": True,
    "logit_bias": {str(CLOSE_ID): 3},
}
CHAT = {name: value for name, value in JOB.items() if name != "ignore_eos"} | {
    "model": MODEL,
    "extra_body": {"ignore_eos": True},
}
LONG = CHAT | {"max_tokens": 1200, "logit_bias": None}


@pytest.fixture(scope="module")
def thinking(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory, given_redis_url: str | None
) -> Iterator[Press]:
    folder = tmp_path_factory.mktemp("thinking")
    model = write_thinking_llama(folder / "model", max_position=8192)
    with (
        databases.fresh("sqlite") as database_url,
        opened_press(folder, database_url, given_redis_url, model) as press,
    ):
        press.start_workers(1)
        yield press
        press.finish()


@pytest.fixture
def sdk(thinking: Press) -> Iterator[OpenAI]:
    thinking.start_workers(1, or_more=True)
    with thinking.openai() as client:
        yield client


def both(message: Any) -> tuple[str, str]:
    """What was thought, what was said: of a message, or of the deltas of one choice."""
    return getattr(message, "reasoning_content", None) or "", message.content or ""


def reasoned(sdk: OpenAI, asked: dict[str, Any], least: int = 1) -> tuple[dict[str, Any], tuple[str, str]]:
    """`asked` with a seed with which the model thinks, and answers, `least` characters or more each."""
    for seed in range(40):
        choice = sdk.chat.completions.create(**asked, seed=seed).choices[0]
        if min(map(len, both(choice.message))) >= least:
            return asked | {"seed": seed}, both(choice.message)
    raise AssertionError("this model never closes its reasoning")


class Heard:
    """The texts of one choice of a stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.texts = ("", "")
        self.name = ""

    def read(self, least: int | None = None) -> Heard:
        """On, until so much was thought, or to the end."""
        for chunk in self._stream:
            self.name = chunk.id
            for choice in chunk.choices:
                thought, said = both(choice.delta)
                assert not (thought and said)
                assert not (thought and self.texts[1]), "thoughts come first"
                self.texts = (self.texts[0] + thought, self.texts[1] + said)
            if least is not None and len(self.texts[0]) >= least:
                break
        return self


def test_a_chat_and_its_stream(sdk: OpenAI) -> None:
    asked, (thought, said) = reasoned(sdk, CHAT)
    whole = sdk.chat.completions.create(**asked, logprobs=True)
    assert both(whole.choices[0].message) == (thought, said)
    assert thought == thought.strip()
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    tokens = [one.token for one in logprobs.content or ()]
    assert whole.usage is not None
    assert len(tokens) == whole.usage.completion_tokens == 80
    details = whole.usage.completion_tokens_details
    assert details is not None
    assert details.reasoning_tokens == tokens.index("</think>")
    with sdk.chat.completions.create(**asked, stream=True) as stream:
        assert Heard(stream).read().texts == (thought, said)


def test_jobs_and_responses(thinking: Press, sdk: OpenAI) -> None:
    asked, (thought, said) = reasoned(sdk, CHAT)
    seed = asked["seed"]
    hushed = JOB | {"chat_template_kwargs": {"enable_thinking": False}}
    prompt = {name: value for name, value in JOB.items() if name != "messages"} | {"prompt": "Rain"}
    batch_id = thinking.submit([one | {"seed": seed} for one in (JOB, hushed, prompt)])
    thinking.finish()
    lines = thinking.http.get(f"/v1/batches/{batch_id}/results").text.splitlines()
    first, quiet, plain = (json.loads(line)["outputs"][0] for line in lines)
    assert (first["reasoning"], first["text"]) == (thought, said)
    assert json.loads(lines[0])["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    for one in (quiet, plain):
        assert one["reasoning"] is None
        assert one["text"]
    made = thinking.http.post(
        "/v1/responses", json={"model": MODEL, "input": ASK, "temperature": 0, "max_output_tokens": 8}
    ).json()
    assert [item["type"] for item in made["output"]] == ["reasoning", "message"]
    again = sdk.responses.create(
        model=MODEL, input=[*made["output"], *ASK], temperature=0, max_output_tokens=8
    )
    assert again.usage is not None
    assert again.usage.output_tokens == 8


def test_a_file(sdk: OpenAI) -> None:
    asked, (thought, said) = reasoned(sdk, CHAT)
    body = JOB | {"model": MODEL, "seed": asked["seed"]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = sdk.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = sdk.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    done = wait_until(
        lambda: (now := sdk.batches.retrieve(batch.id)).status == "completed" and now,
        "the file is answered",
        START_SECONDS,
    )
    answer = json.loads(sdk.files.content(done.output_file_id or "").text)["response"]["body"]
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (thought, said)
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_an_engine_is_killed_while_it_thinks(thinking: Press, sdk: OpenAI) -> None:
    asked, texts = reasoned(sdk, LONG, 300)
    (worker,) = thinking.start_workers(1)
    row = thinking.worker(worker)
    assert row is not None
    with sdk.chat.completions.create(**asked, stream=True) as stream:
        heard = Heard(stream).read(100)
        assert heard.texts[1] == ""
        os.kill(row["engine_pid"], signal.SIGKILL)
        heard.read()
    assert heard.texts == texts
    (job,) = thinking.jobs(Job.id == "job_" + heard.name.removeprefix("chatcmpl-")).values()
    assert job.fence > 1
