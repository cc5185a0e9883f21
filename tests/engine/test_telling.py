"""What an engine tells those who read along: every token that is certain, and nothing that may be taken back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.growth import Growth, join
from engine.request import Completion, Request, RequestId
from engine.sampling_params import SamplingParams
from tests.support.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    return Engine.load(EngineConfig(model=str(folder), kv_cache_memory_bytes=2**22, threads=1))


def request(name: str, **sampling: object) -> Request:
    given = {"temperature": 1.0, "seed": 1, "max_tokens": 12, "ignore_eos": True} | sampling
    params = SamplingParams(**given)  # type: ignore[arg-type]
    return Request(id=RequestId(name, 1), prompt_token_ids=(5, 6, 7), sampling=params, stream=True)


def run(engine: Engine) -> tuple[list[Growth], dict[str, Completion]]:
    """All frames in their order, and the answers."""
    growths: list[Growth] = []
    done: dict[str, Completion] = {}
    while engine.has_work:
        done |= {completion.id.job_id: completion for completion in engine.step()}
        growths += engine.streamed()
    assert engine.num_streams == 0
    engine.check()
    return growths, done


def test_every_step_is_told_of_and_the_last_one_is_the_completions(engine: Engine) -> None:
    engine.add(request("a", n=2, logprobs=1))
    engine.add(replace(request("quiet"), stream=False))
    assert engine.num_streams == 1
    growths, done = run(engine)
    assert {growth.id.job_id for growth in growths} == {"a"}
    assert [growth.starts for growth in growths] == [(i, i) for i in range(11)]
    assert all(not sample.logprobs for growth in growths for sample in growth.generated)
    told = [sample.token_ids for sample in join(growths)]
    assert told == [output.token_ids[:-1] for output in done["a"].outputs]


def test_a_sample_that_ended_is_told_of_no_more(engine: Engine) -> None:
    """Its last tokens may be those of a stop string, which is not in the answer."""
    assert engine.tokenizer is not None
    engine.add(request("free", n=2))
    _, done = run(engine)
    first, second = done["free"].outputs
    text = first.text(engine.tokenizer.decode)
    stop = next(
        text[i : i + 2]
        for i in range(4, len(text))
        if text[i : i + 2] not in second.text(engine.tokenizer.decode)
    )
    engine.add(request("cut", n=2, stop=(stop,)))
    growths, done = run(engine)
    cut, whole = done["cut"].outputs
    assert cut.stop_reason == stop
    told = join(growths)
    assert told[1].token_ids == whole.token_ids[:-1]
    assert 0 < len(told[0].token_ids) < len(cut.token_ids)
    assert told[0].token_ids == cut.token_ids[: len(told[0].token_ids)]


def test_who_comes_late_or_again_is_told_from_the_first_token_on(engine: Engine) -> None:
    first = request("first", max_tokens=20)
    engine.add(first)
    for _ in range(10):
        engine.step()
    checkpoint = engine.generated(first.id)
    engine.add(replace(first, id=RequestId("shares it", 1)))
    news = {growth.id.job_id: growth for growth in engine.streamed()}
    assert news["shares it"].starts == news["first"].starts == (0,)
    assert news["shares it"].generated == news["first"].generated == checkpoint
    run(engine)
    engine.add(replace(first, id=RequestId("first", 2), generated=checkpoint))
    (growth,) = engine.streamed()
    assert growth.starts == (0,)
    assert growth.generated == checkpoint
    engine.abort(RequestId("first", 2))
    assert engine.num_streams == 0


def test_nobody_reads_along_and_nothing_is_told(engine: Engine) -> None:
    engine.add(replace(request("a"), stream=False))
    growths, _ = run(engine)
    assert growths == []
