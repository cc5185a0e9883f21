"""A completion becomes an outcome: text, reasons and OpenAI's logprobs, in JSON that every reader takes."""

from __future__ import annotations

import json

import pytest
from openai.types.chat.chat_completion import ChoiceLogprobs

from engine.checkpoint import Checkpoint
from engine.request import Completion, Output, RequestError, RequestId, TokenLogprobs
from engine.tokenizer import Tokenizer
from jobs.answers import outcome_of
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
