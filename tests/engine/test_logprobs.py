"""Logprobs of generated tokens: what transformers says they are, raw, exact in any crowd, and only when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import LLM
from engine.engine import Engine
from engine.plan import FAILED, Draws, Row
from engine.request import Output, Request, RequestId
from engine.sampler import Sampler
from engine.sampling_params import InvalidParameter, SamplingParams
from tests.support.rollout import sequence
from tests.support.shapes import shape
from tests.support.tiny import EOS_TOKEN_ID, VOCAB_SIZE, write_tiny_llama

NAN_TOKEN = 300
PROMPT = (5, 6, 7, 120, 33)


def sampler(vocab_size: int) -> Sampler:
    return Sampler(shape(vocab_size=vocab_size, eos_token_ids=(EOS_TOKEN_ID,)))


def row(seed: int = 0, **params: Any) -> Row:
    return Row(sequence([1] * 3, SamplingParams(seed=seed, **params)), 3)


def draw(logits: Tensor, rows: list[Row]) -> Draws:
    return sampler(logits.shape[1])(logits.clone(), rows)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# --- the sampler --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 3001])
def test_raw_logprobs_whatever_is_masked_and_filtered(vocab_size: int, dtype: torch.dtype) -> None:
    params: list[dict[str, Any]] = [
        {"logprobs": 20, "temperature": 0.0},
        {"logprobs": 0, "temperature": 2.0},
        {},
        {"logprobs": 7, "top_k": 3, "top_p": 0.5},
        {"logprobs": 1, "temperature": 0.0, "min_tokens": 4, "stop_token_ids": (9,)},
        {"temperature": 0.0},
        {"logprobs": 3, "temperature": 0.4, "top_p": 0.9},
    ]
    rows = [row(seed=i, **one) for i, one in enumerate(params)]
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(len(rows), vocab_size, generator=generator)).to(dtype)
    logits[4, [EOS_TOKEN_ID, 9]] = 30.0
    plain = logits.double().log_softmax(dim=1)
    token_ids, logprobs, *_ = draw(logits, rows)
    assert list(logprobs) == [0, 1, 3, 4, 6]
    for i, made in logprobs.items():
        count = params[i]["logprobs"]
        assert made.token_id == token_ids[i]
        assert made.logprob == pytest.approx(plain[i, token_ids[i]].item(), abs=1e-4)
        expected = sorted(range(vocab_size), key=lambda token_id: (-logits[i, token_id].item(), token_id))
        assert [token_id for token_id, _ in made.top] == expected[:count]
        assert [value for _, value in made.top] == pytest.approx(
            plain[i, expected[:count]].tolist(), abs=1e-4
        )
    assert logprobs[0].top[0] == (logprobs[0].token_id, logprobs[0].logprob)
    # the masked end is the likeliest all the same, and the token drawn in its place was all but impossible
    assert logprobs[4].top[0][0] == EOS_TOKEN_ID
    assert logprobs[4].logprob < -10


def test_equal_logits_are_ordered_by_token_id() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [310, 40, 77]] = 1.0
    (made,) = draw(logits, [row(logprobs=5)]).logprobs.values()
    assert [token_id for token_id, _ in made.top] == [40, 77, 310, 0, 1]


def test_no_more_than_the_vocabulary_has() -> None:
    (made,) = draw(torch.zeros(1, 6), [row(logprobs=20)]).logprobs.values()
    assert [token_id for token_id, _ in made.top] == list(range(6))
    assert made.logprob == pytest.approx(-math.log(6))


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 3001, 49_152])
def test_every_bit_is_the_same_in_any_number_of_rows(threads: int, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 4 * torch.randn(96, vocab_size, generator=generator)
    kinds = [{"logprobs": 0}, {"logprobs": 0}, {"logprobs": 3}, {}, {"logprobs": 0}, {"logprobs": 0}]
    rows = [row(seed=i, temperature=0.0, **kinds[i % len(kinds)]) for i in range(96)]  # type: ignore[arg-type]
    alone = [draw(logits[i : i + 1], rows[i : i + 1]).logprobs.get(0) for i in range(96)]
    assert sum(one is None for one in alone) == 16
    for count in range(1, 97):
        made = draw(logits[-count:], rows[-count:]).logprobs
        assert [made.get(i) for i in range(count)] == alone[-count:], count
    # and the thread count changes nothing either
    torch.set_num_threads(3 - threads)
    assert [draw(logits[i : i + 1], rows[i : i + 1]).logprobs.get(0) for i in range(96)] == alone


def test_rows_that_failed_bring_none() -> None:
    logits = torch.randn(5, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    rows = [row(seed=i, logprobs=2) for i in range(4)]
    rows.append(row(seed=4, logprobs=2, min_tokens=1))
    clean = draw(logits, rows)
    assert list(clean.logprobs) == [0, 1, 2, 3, 4]
    logits[1, 5], logits[2, 7] = float("nan"), float("inf")
    logits[4, EOS_TOKEN_ID] = float("inf")  # masked, but without a softmax
    token_ids, logprobs, *_ = draw(logits, rows)
    assert [token_ids[i] for i in (1, 2, 4)] == [FAILED] * 3
    assert logprobs == {i: clean.logprobs[i] for i in (0, 3)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 3001, 49_152])
def test_every_bit_is_the_same_on_a_gpu(vocab_size: int) -> None:
    logits = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(4)).cuda()
    rows = [row(seed=i, logprobs=3) for i in range(40)]
    together = draw(logits, rows).logprobs
    for i in range(40):
        assert draw(logits[i : i + 1], rows[i : i + 1]).logprobs[0] == together[i]


# --- the engine ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), nan_token_id=NAN_TOKEN)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), kv_cache_memory_bytes=1 << 22, dtype="float32", threads=1)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


def outputs(engine: Engine, **sampling: Any) -> tuple[Output, ...]:
    params = SamplingParams(**{"seed": 1, "max_tokens": 12, "ignore_eos": True} | sampling)
    engine.add(Request(id=RequestId("a", 1), prompt_token_ids=PROMPT, sampling=params))
    while True:
        for completion in engine.step():
            assert completion.error is None
            return completion.outputs


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.5, "n": 2},
        {"temperature": 0.5, "top_k": 5, "top_p": 0.9},
        {"temperature": 0.0, "min_tokens": 6, "stop_token_ids": tuple(range(3, 200)), "ignore_eos": False},
    ],
    ids=str,
)
def test_they_are_those_of_transformers(llm: LLM, theirs: Any, sampling: dict[str, Any]) -> None:
    made = outputs(llm.engine, logprobs=4, **sampling)
    assert len(made) == sampling.get("n", 1)
    for output in made:
        ids = torch.tensor([PROMPT + output.token_ids])
        with torch.inference_mode():
            plain = theirs(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(dim=-1)
        assert output.logprobs is not None
        assert tuple(one.token_id for one in output.logprobs) == output.token_ids
        for one, expected in zip(output.logprobs, plain, strict=True):
            assert one.logprob == pytest.approx(expected[one.token_id].item(), abs=1e-4)
            likeliest = expected.topk(4)
            assert [value for _, value in one.top] == pytest.approx(likeliest.values.tolist(), abs=1e-4)
            assert [token_id for token_id, _ in one.top] == likeliest.indices.tolist()


def test_asking_changes_nothing_else(llm: LLM) -> None:
    quiet = outputs(llm.engine, n=3)
    assert {output.logprobs for output in quiet} == {None}
    for count in (0, 20):
        told = outputs(llm.engine, n=3, logprobs=count)
        assert [output.token_ids for output in told] == [output.token_ids for output in quiet]
        assert all({len(one.top) for one in output.logprobs or ()} == {count} for output in told)


def test_a_stop_string_cuts_them_with_the_tokens(llm: LLM) -> None:
    free = outputs(llm.engine, n=8, max_tokens=30, logprobs=1)
    for index, whole in enumerate(free):
        stop = llm.tokenizer.decode(whole.token_ids)[8]
        cut = outputs(llm.engine, n=8, max_tokens=30, logprobs=1, stop=(stop,))[index]
        kept = len(cut.token_ids)
        assert (cut.stop_reason, cut.token_ids) == (stop, whole.token_ids[:kept])
        assert kept < 30
        assert whole.logprobs is not None
        assert cut.logprobs == whole.logprobs[:kept]


def test_a_request_that_failed_brings_none_and_spoils_none(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=2)
    prompts = [{"prompt_token_ids": PROMPT}, {"prompt_token_ids": (5, NAN_TOKEN)}]
    alone = llm.generate(prompts[0], params, use_tqdm=False)[0]
    good, bad = llm.generate(prompts, params, use_tqdm=False)
    assert good.outputs == alone.outputs
    assert bad.error is not None
    assert (bad.outputs[0].logprobs, bad.outputs[0].cumulative_logprob) == (None, None)


def test_the_python_door_sums_them(llm: LLM) -> None:
    params = [SamplingParams(seed=1, max_tokens=6, logprobs=count) for count in (0, None)]
    told, quiet = (one.outputs[0] for one in llm.generate(["a", "a"], params, use_tqdm=False))
    assert told.logprobs is not None
    assert len(told.logprobs) == len(told.token_ids)
    assert told.cumulative_logprob == pytest.approx(sum(one.logprob for one in told.logprobs))
    assert (quiet.logprobs, quiet.cumulative_logprob) == (None, None)
    assert quiet.token_ids == told.token_ids


@pytest.mark.parametrize("value", [-1, 21, 1.0, True, "3"])
@pytest.mark.parametrize("param", ["logprobs", "prompt_logprobs"])
def test_what_cannot_be_asked_for_is_refused_by_name(param: str, value: Any) -> None:
    with pytest.raises(InvalidParameter, match="from 0 to 20") as caught:
        SamplingParams(**{param: value})
    assert caught.value.param == param
