"""A completion becomes an outcome: text, reasons and OpenAI's logprobs, in JSON that every reader takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import ChoiceLogprobs

from engine.checkpoint import Checkpoint
from engine.reasoning import format_of
from engine.request import Completion, Output, RequestError, RequestId, TokenLogprobs
from engine.tokenizer import Tokenizer
from jobs.answers import outcome_of, outcome_of_death
from jobs.celery_results import answer
from jobs.claims import Claim
from jobs.failures import status_of
from jobs.holdings import Holding
from jobs.openai_answers import completion_object
from jobs.openai_body import CHAT
from jobs.quarantine import SUSPECT
from jobs.terms import Tier
from tests.support.thinking import CLOSE_ID, write_thinking_llama
from tests.support.tiny import EOS_TOKEN_ID, write_tiny_llama

ID = RequestId("job", 3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.open(Checkpoint.open(str(write_tiny_llama(tmp_path_factory.mktemp("tiny")))))


def test_logprobs_have_openais_shape(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.encode("é.")
    likeliest = ((rest[-1], -0.25), (EOS_TOKEN_ID, float("-inf")))
    logprobs = [TokenLogprobs(token_id=first, logprob=-1.5, top=likeliest)]
    logprobs += [TokenLogprobs(token_id=one, logprob=-2.0) for one in (*rest, EOS_TOKEN_ID)]
    told = Output(
        token_ids=(first, *rest, EOS_TOKEN_ID),
        finish_reason="stop",
        last_is_silent=True,
        logprobs=tuple(logprobs),
    )
    quiet = Output(token_ids=(first, *rest), finish_reason="length")
    completion = Completion(id=ID, outputs=(told, quiet), num_prompt=2, num_cached_tokens=1)
    outcome = outcome_of(completion, tokenizer, chat=False)
    assert (outcome.kind, outcome.completion_tokens, outcome.cached_tokens) == ("completed", 7, 1)
    shown = json.loads(json.dumps(outcome.outputs, allow_nan=False))
    assert [one["text"] for one in shown] == ["é."] * 2
    assert shown[1] == {"index": 1, "text": "é.", "finish_reason": "length", "stop_reason": None}
    content = ChoiceLogprobs.model_validate(shown[0]["logprobs"]).content
    assert content is not None
    assert [one.token for one in content] == ["�", "�", ".", "<|im_end|>"]
    assert bytes(byte for one in content for byte in one.bytes or ()).decode() == "é."
    assert [one.bytes for one in content] == [[0xC3], [0xA9], [ord(".")], None]
    assert [one.logprob for one in content] == [-1.5, -2.0, -2.0, -2.0]
    near = [(one.token, one.logprob) for one in content[0].top_logprobs]
    assert near == [(".", -0.25), ("<|im_end|>", -9999.0)]
    assert [one.top_logprobs for one in content[1:]] == [[], [], []]


def test_failures_and_aborts_tell_what_was_worked_for(tokenizer: Tokenizer) -> None:
    error = RequestError(code="numerics", message="NaN")
    failed = outcome_of(Completion(id=ID, error=error, num_prompt=5, num_generated=2), tokenizer, chat=True)
    assert (failed.kind, failed.error) == ("failed", {"code": "numerics", "message": "NaN", "param": None})
    assert (failed.prompt_tokens, failed.completion_tokens, failed.outputs) == (5, 2, [])
    named = RequestError(code="invalid_request", message="structured_outputs.regex: at 1(8): no")
    error_told = outcome_of(Completion(id=ID, error=named, num_prompt=5), tokenizer, chat=True).error
    assert error_told is not None
    assert error_told["param"] == "structured_outputs.regex"
    too_long = Completion(
        id=ID, error=RequestError(code="context_length_exceeded", message="long"), num_prompt=5
    )
    for chat, param in ((True, "messages"), (False, "prompt")):
        error_told = outcome_of(too_long, tokenizer, chat=chat).error
        assert error_told is not None
        assert error_told["param"] == param
    gone = outcome_of(Completion(id=ID, aborted=True, num_prompt=5), tokenizer, chat=True)
    assert (gone.kind, gone.prompt_tokens, gone.completion_tokens) == ("released", 0, 0)


def test_what_was_thought_stands_beside_what_was_said(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(Checkpoint.open(str(write_thinking_llama(tmp_path))))
    form = format_of(tokenizer, "auto")
    thought, said = tokenizer.encode("the fox\n"), tokenizer.encode("the dog")
    ids = (*thought, CLOSE_ID, *said, EOS_TOKEN_ID)
    whole = Output(token_ids=ids, finish_reason="stop", last_is_silent=True, begins="reasoning")
    outputs = (
        whole,
        replace(whole, token_ids=tuple(thought), last_is_silent=False),
        replace(whole, begins="answer"),
    )
    outcome = outcome_of(Completion(id=ID, outputs=outputs, num_prompt=2), tokenizer, form, chat=True)
    assert outcome.completion_tokens == 2 * len(ids) + len(thought)
    shown = [(one["text"], one.get("reasoning"), one.get("reasoning_tokens")) for one in outcome.outputs]
    assert shown == [
        ("the dog", "the fox", len(thought)),
        ("", "the fox", len(thought)),
        ("the fox\n</think>the dog", None, None),
    ]
    told = answer(outcome, "m")
    assert (told["text"], told["reasoning"]) == ("the dog", "the fox")
    assert told["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2 * len(thought)}
    body = completion_object(CHAT, outcome.outputs, answer_id="a", created=1, model="m", usage=told["usage"])
    messages = [choice.message.to_dict() for choice in ChatCompletion.model_validate(body).choices]
    assert [one.get("reasoning_content") for one in messages] == ["the fox", "the fox", None]
    assert "reasoning_content" not in messages[2]


@pytest.mark.parametrize(
    ("num_saved", "alone", "kind"), [(0, True, "failed"), (9, True, "released"), (0, False, "released")]
)
def test_who_is_alone_when_an_engine_dies_fails_unless_it_got_further(
    num_saved: int, alone: bool, kind: str
) -> None:
    claim = Claim(ID.job_id, ID.fence, {}, 0, SUSPECT, "http", "t", Tier.NORMAL, 0.0, None)
    holding = Holding(claim, sent=True, num_generated=12, num_saved=num_saved)
    outcome = outcome_of_death(holding, 7, stalled=False, alone=alone)
    assert (outcome.kind, outcome.crashes, outcome.kept_tokens) == (kind, 2 * SUSPECT, num_saved)
    assert (outcome.error is not None) == (kind == "failed")


def test_an_output_without_words_fails_its_own_job(tokenizer: Tokenizer) -> None:
    """Raised on the way, it would end the engine with everybody else's."""
    output = Output(token_ids=(5, -1), finish_reason="length")  # an id that no tokenizer takes
    completion = Completion(id=ID, outputs=(output,), num_prompt=4, num_generated=2)
    outcome = outcome_of(completion, tokenizer, chat=False)
    assert (outcome.job_id, outcome.fence, outcome.kind) == ("job", 3, "failed")
    assert (outcome.prompt_tokens, outcome.completion_tokens, outcome.outputs) == (4, 2, [])
    assert outcome.error is not None
    assert outcome.error["code"] == "decode_failed"
    assert status_of("decode_failed") == 500
