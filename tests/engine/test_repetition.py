"""A sample that loops is seen at the token that completes the loop, and ends there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.repetition import repeats
from engine.request import Request, RequestId
from engine.sampling_params import InvalidParameter, RepetitionDetectionParams, SamplingParams
from tests.support.pressure import run
from tests.support.tiny import write_tiny_llama


def plain(generated: list[int], rule: RepetitionDetectionParams) -> bool:
    for size in range(rule.min_pattern_size, rule.max_pattern_size + 1):
        pattern = generated[-size:]
        if len(generated) >= size * rule.min_count and generated[-size * rule.min_count :] == (
            pattern * rule.min_count
        ):
            return True
    return False


def test_equals_the_definition() -> None:
    rng = random.Random(1)
    seen = 0
    for _ in range(20_000):
        most = rng.randrange(1, 6)
        rule = RepetitionDetectionParams(
            max_pattern_size=most, min_pattern_size=rng.randrange(1, most + 1), min_count=rng.randrange(2, 5)
        )
        prompt = rng.choices((1, 2), k=rng.randrange(5))
        generated = rng.choices((1, 2), k=rng.randrange(1, 20))
        found = repeats(prompt + generated, len(generated), rule)
        assert found == plain(generated, rule)
        seen += found
    assert 2_000 < seen < 18_000


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_pattern_size": 0}, "max_pattern_size"),
        ({"max_pattern_size": 257}, "max_pattern_size"),
        ({"max_pattern_size": 3, "min_pattern_size": 4}, "min_pattern_size"),
        ({"max_pattern_size": 3, "min_count": 1}, "min_count"),
        ({"max_pattern_size": 3, "min_count": True}, "min_count"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, int], param: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        RepetitionDetectionParams(**fields)
    assert caught.value.param == f"repetition_detection.{param}"


def test_a_loop_ends_the_sample_but_not_before_min_tokens(tmp_path: Path) -> None:
    engine = Engine.load(
        EngineConfig(model=str(write_tiny_llama(tmp_path)), threads=1, kv_cache_memory_bytes=1 << 22)
    )
    rule = RepetitionDetectionParams(max_pattern_size=2, min_count=3)
    requests = []
    for number, min_tokens in enumerate((0, 20)):
        sampling = SamplingParams(
            seed=0,
            max_tokens=50,
            min_tokens=min_tokens,
            logit_bias={9: 100},
            temperature=0.0,
            ignore_eos=True,
            repetition_detection=rule,
        )
        requests.append(
            Request(id=RequestId(str(number), 1), prompt_token_ids=(9, 9, 9, 9), sampling=sampling)
        )
    done = run(engine, requests)
    outputs = [done[request.id].outputs[0] for request in requests]
    assert [(output.token_ids, output.finish_reason) for output in outputs] == [
        ((9,) * 3, "repetition"),
        ((9,) * 20, "repetition"),
    ]
