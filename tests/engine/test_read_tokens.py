"""Where few tokens of a step are read the last block makes only those, and their logits are what they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.linear import Linear
from engine.plan import Plan, Row
from engine.request import Request, RequestId
from engine.runner import ModelRunner, load_decoder
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.step_input import StepInput
from kernels import kernels_for
from tests.support.families import write_tiny

PAGE = 16
CPU = replace(kernels_for("cpu", "cpu"), multiplies=(torch.float32, torch.bfloat16))
KINDS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Gemma2ForCausalLM": {},  # norms of what halves add
    "FalconForCausalLM": {"parallel_attn": True, "new_decoder_architecture": False},  # halves side by side
    "MixtralForCausalLM": {},  # experts
}


def plan(*counts: tuple[int, int]) -> Plan:
    """Rows of a prompt's length and how many of its tokens are computed now."""
    rows, page = [], 0
    for number, (length, now) in enumerate(counts):
        prompt = tuple((7 * i + number) % 90 + 3 for i in range(length))
        request = Request(
            id=RequestId(f"{number}", 1), prompt_token_ids=prompt, sampling=SamplingParams(seed=1)
        )
        sequence = Sequence(request, 0, max_tokens=5)
        sequence.pages = list(range(page, page + 6))
        page += 6
        rows.append(Row(sequence, now))
    return Plan(tuple(rows))


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_are_the_same(tmp_path: Path, architecture: str, fuse: bool, dtype: torch.dtype) -> None:
    write_tiny(tmp_path, architecture, KINDS[architecture])
    kernels = CPU if fuse else replace(CPU, fuse=None)
    with torch.inference_mode():
        decoder = load_decoder(Checkpoint.open(str(tmp_path)), kernels, dtype=dtype, device="cpu")
        config = EngineConfig(model=str(tmp_path), device="cpu", page_size=PAGE, dtype="float32")
        runner = ModelRunner.over(decoder, config)
        asked = plan((40, 40), (1, 1), (50, 31))
        step = StepInput.build(asked, PAGE, row_multiple=4)
        assert step.read is not None
        assert step.read.tolist() == [0, 0, 39, 40]
        everything = decoder.forward(replace(step, read=None), runner.cache)
        assert torch.equal(decoder.forward(step, runner.cache), everything)
        assert everything[:2].isfinite().all()


def test_the_last_block_multiplies_those_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path, "LlamaForCausalLM", {})
    seen: list[int] = []
    call = Linear.__call__

    def counted(product: Linear, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0])
        return call(product, x)

    with torch.inference_mode():
        kernels = replace(CPU, fuse=None)
        decoder = load_decoder(Checkpoint.open(str(tmp_path)), kernels, dtype=torch.float32, device="cpu")
        config = EngineConfig(model=str(tmp_path), device="cpu", page_size=PAGE, dtype="float32")
        runner = ModelRunner.over(decoder, config)
        monkeypatch.setattr(Linear, "__call__", counted)
        decoder.hidden(StepInput.build(plan((40, 40), (50, 31)), PAGE), runner.cache)
    assert seen[-4:] == [71, 1, 1, 1]
    assert set(seen[:-3]) == {71}


def test_a_step_that_nobody_reads_makes_one() -> None:
    step = StepInput.build(plan((50, 20), (50, 12)), PAGE)
    assert step.read is not None
    assert step.read.tolist() == [0]
    assert step.logit_rows.shape == step.scored_rows.shape == (0,)


def test_where_many_are_read_all_are_made() -> None:
    assert StepInput.build(plan((1, 1), (1, 1), (3, 3)), PAGE).read is None
