"""What a step of decoding asks of a GPU, counted: no node of its graphs is added unnoticed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import kernels_for
from kernels.gpu import INTERPRETED
from tests.support.launches import recorded, step_launches

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter runs")
A_LAYER = (
    "norm_kernel",
    "mm",
    "norm_rope_store_kernel",
    "single",
    "reduce",
    "mm",
    "norm_kernel",
    "mm",
    "act_kernel",
    "mm",
)
BEFORE, BEHIND = ("look_up_kernel",), ("norm_kernel", "mm")  # of the layers, behind them up to the logits
FURTHER: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"temperature": 1.0, "top_p": 0.9}, ("filter_kernel",)),
    ({"temperature": 1.0, "presence_penalty": 0.5}, ("_to_copy", "penalise_kernel", "count_kernel")),
    ({"temperature": 1.0, "logprobs": 0}, ("block_kernel", "normaliser_kernel")),
]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_layer_is_ten(tmp_path: Path, layers: int) -> None:
    found = [launch.name for launch in step_launches(tmp_path, layers=layers)]
    assert tuple(found[:-3]) == (*BEFORE, *layers * A_LAYER, *BEHIND)
    assert found[-3:] == ["block_kernel", "draw_kernel", "advance_kernel"]


@pytest.mark.parametrize(("asked", "further"), FURTHER)
def test_what_rows_ask_for(tmp_path: Path, asked: dict[str, Any], further: tuple[str, ...]) -> None:
    plain = Counter(launch.name for launch in step_launches(tmp_path / "plain", layers=1))
    found = Counter(launch.name for launch in step_launches(tmp_path, layers=1, asked=asked))
    assert found == plain + Counter(further)


def test_what_is_counted() -> None:
    """Kernels and operations of torch, those that others are made of, too; no views and no fresh memory."""
    norm, x = kernels_for("cpu", "triton").rms_norm, torch.ones(2, 16)
    with torch.inference_mode(), recorded() as found:
        y = norm(x[:, :16], x[0], 1e-5)
        torch.empty_like(y).t()
        torch.where(y > 0, y, -1)
        torch.nn.functional.linear(x, x)
    names = [launch.name for launch in found]
    assert names == ["norm_kernel", "gt.Scalar", "scalar_tensor", "where.self", "mm"]
    assert found[0].origin.startswith("kernels/gpu/norm.py:")
    assert found[1].origin == "?"
