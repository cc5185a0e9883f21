"""Frames: every message survives the trip, and nothing else gets in."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import msgpack
import pytest

from engine import wire
from engine.config import EngineConfig
from engine.growth import Growth
from engine.request import (
    Completion,
    Generated,
    Output,
    Rejected,
    Request,
    RequestError,
    RequestId,
    TokenLogprobs,
)
from engine.sampling_params import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams
from engine.wire import FrameReader, FrameWriter, Message, WireError, decode, encode
from tests.support.checked import checked_engine

ID = RequestId("job-1", 3)
SAMPLING = SamplingParams(
    n=2,
    temperature=0,
    top_p=0.5,
    top_k=7,
    seed=-(2**63),
    max_tokens=None,
    stop=("a", "é🙂"),
    stop_token_ids=(4,),
    logprobs=0,
    prompt_logprobs=20,
    min_p=0.5,
    repetition_detection=RepetitionDetectionParams(max_pattern_size=3),
    repetition_penalty=2,
    logit_bias={5: -1.5, 2**31: 3},
    bad_words=("b",),
    allowed_token_ids=(9, 8),
)
STRUCTURED = Request(
    id=ID,
    prompt_token_ids=(1,),
    sampling=SamplingParams(seed=0, structured_outputs=StructuredOutputsParams(json={"const": None})),
)
REQUEST = Request(id=ID, prompt_token_ids=(1, 2, 2**31), sampling=SAMPLING)
COMPLETIONS = (
    Completion(
        id=ID,
        outputs=(
            Output(token_ids=(5, 6), finish_reason="stop", stop_reason="é", text_cut=0),
            Output(token_ids=(), finish_reason="length"),
            Output(
                token_ids=(9, 3),
                finish_reason="stop",
                stop_reason=9,
                logprobs=(
                    TokenLogprobs(token_id=9, logprob=-0.1, top=((9, -0.1), (2**31, float("-inf")))),
                    TokenLogprobs(token_id=3, logprob=-2.0),
                ),
            ),
        ),
        num_prompt=3,
        num_generated=2,
        prompt_logprobs=(None, TokenLogprobs(token_id=2, logprob=-1.5, top=((2, -1.5),))),
    ),
    Completion(id=ID, error=RequestError(code="numerics", message="m")),
    Completion(id=ID, aborted=True, num_generated=1, generated=(Generated(token_ids=(7,)),)),
)
MESSAGES: list[Message] = [
    wire.Configure(EngineConfig(model="m", max_num_seqs=4, kv_cache_memory_bytes=1 << 40)),
    wire.Add((REQUEST, STRUCTURED)),
    wire.Abort((ID, RequestId("", 0))),
    wire.Stop(),
    wire.Hello(
        model="m",
        pid=1,
        max_model_len=512,
        num_pages=9,
        page_size=16,
        max_num_seqs=4,
        credits=16,
        vocab_size=320,
        device="cpu",
        dtype="float32",
        kernels="cpu",
        deterministic=True,
        versions={"torch": "2"},
        load_seconds=0.5,
    ),
    wire.Completions(COMPLETIONS),
    wire.Progress({ID: 7}),
    wire.Configure(EngineConfig(model="m"), checkpoint_seconds=2.5),
    wire.Grown((Growth(id=ID, starts=(4, 0), generated=(Generated(token_ids=(5,)), Generated())),)),
    wire.Stats({"num_steps": 1, "busy_seconds": 0.25}),
    wire.Fatal("why", "run"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_comes_back_equal(message: Message) -> None:
    frame = encode(message)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert decode(frame[4:]) == message


def body(kind: object, fields: object) -> bytes:
    packed: bytes = msgpack.packb([kind, fields])
    return packed


GOOD = {"id": ["a", 1], "prompt_token_ids": [1], "sampling": {"seed": 1}}


def with_top(pair: list[object]) -> dict[str, object]:
    """A completion of one token whose logprobs hold `pair`."""
    logprobs = [{"token_id": 9, "logprob": -1.0, "top": [pair]}]
    return {
        "id": ["a", 1],
        "outputs": [{"token_ids": [9], "finish_reason": "length", "logprobs": logprobs}],
    }


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (b"\xc1", "not msgpack"),
        (b"", "not msgpack"),
        (msgpack.packb([1, 2, 3]), "must be"),
        (body("Explode", {}), "unknown message 'Explode'"),
        (body("Stop", []), "Stop: must be a map"),
        (body("Stop", {"force": True}), "Stop: unknown field 'force'"),
        (body("Add", {}), "Add: field 'requests' is missing"),
        (body("Add", {"requests": {}}), "Add.requests: must be a list"),
        (body("Add", {"requests": [GOOD | {"id": ["a"]}]}), r"Add.requests\[0\].id: must be a list of 2"),
        (body("Add", {"requests": [GOOD | {"id": ["a", True]}]}), r"id.fence: must be int"),
        (
            body("Add", {"requests": [GOOD | {"prompt_token_ids": [1, 2.0]}]}),
            "prompt_token_ids: must be a list of int",
        ),
        (
            body("Add", {"requests": [GOOD | {"prompt_token_ids": [True]}]}),
            "prompt_token_ids: must be a list of int",
        ),
        (
            body("Add", {"requests": [GOOD | {"sampling": {"temperature": "1"}}]}),
            "temperature: must be a number",
        ),
        (
            body("Add", {"requests": [GOOD | {"sampling": {"temperature": 9}}]}),
            "temperature: must be at least 0",
        ),
        (body("Completions", {"completions": [with_top([9])]}), r"top\[0\]: must be a list of 2"),
        (body("Completions", {"completions": [with_top([9, -1.0, 0])]}), r"top\[0\]: must be a list of 2"),
        (body("Completions", {"completions": [with_top([9.0, -1.0])]}), r"top\[0\]\[0\]: must be int"),
        (body("Completions", {"completions": [with_top([9, "x"])]}), r"top\[0\]\[1\]: must be a number"),
        (body("Fatal", {"reason": "x", "phase": "later"}), "Fatal.phase: must be one of 'start', 'run'"),
        (body("Fatal", {"reason": b"x", "phase": "run"}), "Fatal.reason: must be str"),
    ],
)
def test_what_is_not_declared_is_refused_by_name(frame: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says):
        decode(frame)


def test_frames_follow_each_other_through_a_pipe_until_it_ends() -> None:
    read_fd, write_fd = os.pipe()
    reader, writer = FrameReader(read_fd), FrameWriter(write_fd)
    big = wire.Add((Request(id=ID, prompt_token_ids=tuple(range(200_000)), sampling=SAMPLING),))

    def send() -> None:  # more than a pipe holds, so beside the reader
        for message in (*MESSAGES, big):
            writer.write(message)
        writer.close()

    sender = threading.Thread(target=send)
    sender.start()
    got = []
    while (message := reader.read()) is not None:
        got.append(message)
    sender.join()
    reader.close()
    assert got == [*MESSAGES, big]


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"\x00\x00", "announced"),
        (b"\xff\xff\xff\xff", "announced"),
        (encode(wire.Stop())[:-1], "stopped after"),
    ],
)
def test_a_pipe_that_ends_or_lies_is_an_error(sent: bytes, says: str) -> None:
    read_fd, write_fd = os.pipe()
    os.write(write_fd, sent)
    os.close(write_fd)
    reader = FrameReader(read_fd)
    with pytest.raises(WireError, match=says):
        reader.read()
    reader.close()


def test_a_message_over_the_cap_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 40)
    with pytest.raises(wire.FrameTooLargeError, match="Completions takes"):
        encode(wire.Completions(COMPLETIONS))


@pytest.mark.parametrize(("logprobs", "prompt_logprobs"), [(None, None), (0, None), (None, 3), (20, 20)])
def test_answers_that_could_be_too_long_are_refused_before(
    monkeypatch: pytest.MonkeyPatch, logprobs: int | None, prompt_logprobs: int | None
) -> None:
    """The longest answer there can be fits where it is let in, and the bound is not far above it."""
    most, num_prompt = 2**32 - 1, 5000

    def made(count: int | None, number: int) -> tuple[TokenLogprobs, ...]:
        one = TokenLogprobs(token_id=most, logprob=-0.1, top=((most, -0.1),) * (count or 0))
        return (one,) * number

    output = Output(
        token_ids=(most,) * 3000,
        finish_reason="repetition",
        stop_reason="🙂" * 256,
        text_cut=2**40,
        last_is_silent=True,
        logprobs=None if logprobs is None else made(logprobs, 3000),
    )
    longest = Completion(
        id=RequestId("j" * 255, 2**40),
        outputs=(output,) * 2,
        num_prompt=num_prompt,
        num_generated=6000,
        num_cached_tokens=num_prompt,
        prompt_logprobs=None if prompt_logprobs is None else (None, *made(prompt_logprobs, num_prompt - 1)),
    )
    request = Request(
        id=longest.id,
        prompt_token_ids=(5,) * num_prompt,
        sampling=SamplingParams(seed=1, n=2, logprobs=logprobs, prompt_logprobs=prompt_logprobs),
    )
    size = len(encode(wire.Completions((longest,)))) - 4
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", size - 1)
    with pytest.raises(Rejected, match=f"prompt_logprobs {prompt_logprobs}, could take .* ask for less of n"):
        wire.check_answer_fits(request, 3000)
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", int(1.15 * size) + 2**15)
    wire.check_answer_fits(request, 3000)
    encode(wire.Completions((longest,)))


def test_an_engine_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = checked_engine(100)
    asked = replace(REQUEST, prompt_token_ids=(5, 6), sampling=SamplingParams(seed=1, logprobs=20, n=8))
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 60_000)
    with pytest.raises(Rejected, match="8 samples of up to 16 tokens") as caught:
        engine.add(asked)
    assert caught.value.code == "invalid_request"
    assert not engine.has_work
    engine.add(replace(asked, sampling=replace(asked.sampling, logprobs=0)))
    assert engine.has_work


def test_only_declared_dataclasses_can_be_sent() -> None:
    with pytest.raises(TypeError, match="does not travel"):
        encode(wire.Stats({"x": object()}))  # type: ignore[dict-item]
