"""Weights that stay quantised on a GPU: products near to those of the plain weights, whatever the number of rows, and
the same bits alone and in a crowd.

Runs as `test_on_gpu` does: where there is no GPU, by the kernels of the CPU, for which all weights are made plain.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.linear import Linear
from engine.model import Decoder
from engine.quantised_linear import QuantisedLinear
from engine.request import Request, RequestId
from engine.runner import load_decoder
from engine.sampling_params import SamplingParams
from kernels import kernels_for
from kernels.reference import KERNELS
from tests.engine.test_alone_equals_crowd import Answers, comparable
from tests.engine.test_kept_weights import CASES, multiple_of_blocks, tiny
from tests.engine.test_mxfp4 import write as write_experts
from tests.engine.test_on_gpu import KERNELS as SETS
from tests.engine.test_on_gpu import device as device
from tests.engine.test_on_gpu import load
from tests.engine.test_stacked_experts import FORMATS, written
from tests.support.pressure import run
from tests.support.quantised import write

ROUNDED = 0.06  # of the size of a product, where x is rounded to 8 bits too


def products(folder: Path, device: str, *, reference: bool = False) -> list[Linear]:
    kernels = KERNELS if reference else kernels_for(device, SETS[device])  # type: ignore[arg-type]
    dtype = torch.float32 if reference else torch.bfloat16
    with torch.inference_mode():
        decoder = load_decoder(Checkpoint.open(str(folder)), kernels, dtype=dtype, device=device)
        assert isinstance(decoder, Decoder)
        decoder.prepare(64)
        return decoder._products()


@pytest.mark.parametrize("name", CASES)
def test_products_are_near_to_those_of_plain_weights(device: str, tmp_path: Path, name: str) -> None:
    quantised, plain = write(tiny(tmp_path / "model", **multiple_of_blocks(name)), *CASES[name])
    found, wanted = products(quantised, device), products(plain, device, reference=True)
    assert device == "cpu" or sum(isinstance(one, QuantisedLinear) for one in found) == 4
    for ours, theirs in zip(found, wanted, strict=True):
        for rows in (1, 16, 17, 64, 128, 129, 700):
            x = torch.randn(rows, ours.num_inputs, device=device).bfloat16()
            exact = theirs(x.float())
            error = (ours(x).float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            assert error < (ROUNDED if "gptq" not in name and "awq" not in name else 0.01), (ours.shape, rows)


@pytest.mark.parametrize("name", ["awq", "gptq act-order", "fp8 blocks", "channels"])
def test_alone_and_in_a_crowd_the_bits_are_the_same(device: str, tmp_path: Path, name: str) -> None:
    quantised, _ = write(tiny(tmp_path / "model", **multiple_of_blocks(name)), *CASES[name])
    engine = load(quantised, device, 400, deterministic=True, max_num_seqs=64)
    assert engine.runner.deterministic
    requests = [
        Request(
            id=RequestId(str(number), 1),
            prompt_token_ids=tuple(range(5 + number, 15 + 3 * number)),
            sampling=SamplingParams(temperature=1.0, seed=number, max_tokens=20, ignore_eos=True),
        )
        for number in range(40)
    ]

    def tokens(some: list[Request]) -> dict[RequestId, tuple[int, ...]]:
        return {key: one.outputs[0].token_ids for key, one in run(engine, some, poison=False).items()}

    together = tokens(requests)
    for request in requests[::7]:
        assert tokens([request]) == {request.id: together[request.id]}


def alone_and_in_a_crowd(folder: Path, device: str) -> Answers:
    """Of a deterministic engine, through graphs where there is a GPU: tokens and logprobs, which are the same."""
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=30, ignore_eos=True, logprobs=0)
    requests = [
        Request(
            id=RequestId(str(number), 1),
            prompt_token_ids=tuple(range(5 + number, 15 + 3 * number)),
            sampling=sampling,
        )
        for number in range(40)
    ]
    engine = load(folder, device, 1000, deterministic=True, max_num_seqs=64)
    assert engine.runner.deterministic
    found = comparable(run(engine, requests, poison=False))
    for request in requests[::13]:
        alone = comparable(run(engine, [request], poison=False))
        assert alone == {request.id: found[request.id]}
    return found


def test_experts_in_4_bits_answer_as_plain_ones_do_alone_and_in_a_crowd(device: str, tmp_path: Path) -> None:
    """Bit for bit."""
    quantised, plain = write_experts(tmp_path)
    assert alone_and_in_a_crowd(quantised, device) == alone_and_in_a_crowd(plain, device)


@pytest.mark.parametrize("name", FORMATS)
def test_experts_side_by_side_answer_alike_alone_and_in_a_crowd(
    device: str, tmp_path: Path, name: str
) -> None:
    alone_and_in_a_crowd(written(tmp_path, name)[0], device)


@pytest.mark.parametrize("name", ["gptq", "fp8 whole"])
def test_an_engine_decodes_many_steps_together(device: str, tmp_path: Path, name: str) -> None:
    """Through its graphs, with more rows than a kernel for few tokens takes."""
    quantised, _ = write(tiny(tmp_path / "model"), *CASES[name])
    engine = load(quantised, device, 1000, max_num_seqs=160)
    sampling = SamplingParams(temperature=0.0, seed=1, max_tokens=40, ignore_eos=True)
    requests = [
        Request(id=RequestId(str(n), 1), prompt_token_ids=(3 + n, 7, 50), sampling=sampling)
        for n in range(160)
    ]
    done = run(engine, requests, poison=False)
    assert all(len(one.outputs[0].token_ids) == 40 for one in done.values())
