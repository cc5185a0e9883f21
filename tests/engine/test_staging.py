"""Arrays on their way to a device: what arrives, and that between a forward and its draws nobody waits for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.checkpoint import Checkpoint
from engine.grammars import Grammars
from engine.plan import Row
from engine.request import Request, RequestId
from engine.sampler import Sampler
from engine.sampling_params import SamplingParams, StructuredOutputsParams
from engine.sequence import Sequence
from engine.staging import put, staged, staged_ints
from engine.tokenizer import Tokenizer
from engine.vocabulary import bad_word_ids
from kernels import kernels_for
from tests.support.shapes import shape
from tests.support.tiny import EOS_TOKEN_ID, VOCAB_SIZE, write_tiny_llama

ARRAYS: tuple[NDArray[Any], ...] = (
    np.arange(12, dtype=np.int64).reshape(3, 4),
    np.array([True, False, True]),
    np.array([0.1, -2.5, np.nan]),
    np.array([[255, 0], [7, 128]], dtype=np.uint8),
    np.zeros((0, 4), dtype=np.int32),
)
# everything that makes a sampler look something up for its rows
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    {"min_tokens": 4},
    {"logit_bias": {7: 2.5, 9: -1.0}},
    {"bad_words": ["a"]},
    {"allowed_token_ids": [3, 5, 8]},
    {"frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"structured_outputs": StructuredOutputsParams(regex="[a-z]{4,8}")},
)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return str(request.param)


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}")
def test_an_array_arrives_as_it_is(array: NDArray[Any], device: str) -> None:
    there = staged(array.copy(), device)
    assert there.device.type == device
    np.testing.assert_array_equal(there.cpu().numpy(), array, strict=True)
    target = torch.ones((array.shape[0], *array.shape[1:], 2), dtype=there.dtype, device=device)[..., 0]
    put(array, target)
    np.testing.assert_array_equal(target.cpu().numpy(), array, strict=True)


def test_lists_become_int64(device: str) -> None:
    for values in ([], [3, -(2**62), 2**62]):
        there = staged_ints(values, device)
        assert (there.dtype, there.device.type, there.tolist()) == (torch.int64, device, values)


def rows_of_all_kinds(folder: Path) -> list[Row]:
    tokenizer = Tokenizer.open(Checkpoint.open(str(write_tiny_llama(folder))))
    grammars = Grammars(tokenizer, VOCAB_SIZE, (EOS_TOKEN_ID,))
    rows = []
    for i, kind in enumerate(KINDS * 2 + KINDS[:1]):
        sampling = SamplingParams(seed=i, max_tokens=99, **kind)
        request = Request(id=RequestId("a", i), prompt_token_ids=(5, 6, 7), sampling=sampling)
        one = Sequence(request, 0, 99, bad_word_ids(tokenizer, sampling.bad_words))
        if (wish := sampling.structured_outputs) is not None:
            (one.matcher,) = grammars.matchers(wish, [()])
        rows.append(Row(one, 3))
    return rows


def waits(call: Callable[[], object]) -> int:
    """For how many copies and looks the host waited, as torch counts them; on a CPU there are none."""
    on_gpu = torch.cuda.is_available()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in said)


def test_a_sampler_waits_for_its_tokens_only(device: str, tmp_path: Path) -> None:
    sampler = Sampler(shape(vocab_size=VOCAB_SIZE, eos_token_ids=(EOS_TOKEN_ID,)), kernels_for(device))
    rows = rows_of_all_kinds(tmp_path)
    logits = torch.randn(len(rows), VOCAB_SIZE, device=device, dtype=torch.bfloat16)
    first = sampler(logits.clone(), rows)  # on a GPU it compiles
    assert waits(lambda: torch.ones(1, device=device).item()) == (device == "cuda")
    draws = []
    assert waits(lambda: draws.append(sampler(logits.clone(), rows))) == (device == "cuda")
    assert draws == [first]
