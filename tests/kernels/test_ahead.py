"""The triton set compiles for GPUs that are not there, and on sm_90 nothing spills but attention of less usual kinds,
which spills no more than here."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.tree import ROOT

FEW = "--once --dtypes bf16 --storages plain --dims 128 --groups 4 --options causal"
OTHERS = (
    "--groups 4 --options all --dims 64 128 256 --dtypes bf16",
    "--groups 4 --options all --dims 128 --dtypes fp16 fp32",
)
ALL_OF = {
    "sm_80": OTHERS,
    "sm_90": (
        "--groups 4 --options causal all --dims 64 80 128 256 --dtypes bf16",
        "--groups 1 7 71 --options causal all --dims 64 --dtypes bf16 --storages plain --parts attention",
        "--groups 4 --options window softcap slopes --dims 128 --dtypes bf16 --storages plain --parts attention",
        "--groups 8 --options sinks --dims 64 --dtypes bf16 --parts attention",
        "--groups 4 --options causal window --dims 64 128 --dtypes bf16 --parts attention --pages 16",
        "--groups 4 --options all --dims 128 --dtypes fp16 --storages plain fp8",
        "--groups 4 --options all --dims 64 128 256 --dtypes fp32 --storages plain int8",
    ),
    "sm_100": OTHERS,
}
NAMES = {
    "single",
    "many",
    "reduce",
    "prefix",
    "store_kv_kernel",
    "norm_rope_store_kernel",
    "norm_kernel",
    "rope_kernel",
    "act_kernel",
    "softcap_kernel",
    "block_kernel",
    "draw_kernel",
    "filter_kernel",
    "normaliser_kernel",
    "penalise_kernel",
    "count_kernel",
    "look_up_kernel",
    "advance_kernel",
    "matmul_kernel",
    "sum_kernel",
    "grouped_kernel",
    "grouped_fp8_kernel",
    "grouped_int4_kernel",
    "route_kernel",
    "group_kernel",
    "combine_kernel",
    "int4_kernel",
    "int4_plain_kernel",
    "fp8_kernel",
    "quantise_kernel",
}
NEWER = {"fp8_kernel", "quantise_kernel"}  # than sm_80
# bytes of a thread at most: a cache of 8 bits, heads whose dimension is no power of two, small pages, or window, cap
# and slopes at once
SPILLED = {"many": 700, "prefix": 64, "single": 8}


def compiled(target: str, options: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.ahead", target, *options.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.long
def test_one_of_each_compiles_and_none_spills() -> None:
    found = compiled("sm_90", FEW)
    assert {kernel["kernel"] for kernel in found} == NAMES
    assert not [kernel for kernel in found if kernel["spilled"]]
    assert all(kernel["registers"] > 0 for kernel in found)


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        pytest.param("sm_90", "wgmma", marks=pytest.mark.long),
        pytest.param("sm_80", "mma.sync", marks=pytest.mark.interpreted),
        pytest.param("sm_100", "tcgen05.mma", marks=pytest.mark.interpreted),
    ],
)
def test_all_products_of_a_dtype_are_made_by_one_instruction(target: str, instruction: str) -> None:
    """So the number of tokens, which chooses among tiles, does not choose in which order tensor cores sum."""
    for dtype in ("bf16", "fp16"):
        found = compiled(target, f"--parts products mixtures --dtypes {dtype}")
        ours = ("matmul_kernel", "grouped_kernel")
        made = {tuple(kernel["products"]) for kernel in found if kernel["kernel"] in ours}
        ((only,),) = made
        assert only.startswith(instruction)
        grouped = [kernel for kernel in found if kernel["kernel"] == "grouped_kernel"]
        assert {kernel["experts"] for kernel in grouped} == {"plain", "4 bits"}
        of_8_bits = {
            tuple(kernel["products"]) for kernel in found if kernel["kernel"] == "grouped_fp8_kernel"
        }
        assert len(of_8_bits) == (target != "sm_80")
        if target == "sm_90":
            assert not [kernel for kernel in found if kernel["spilled"]]


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("sm_90", marks=pytest.mark.long),
        *(pytest.param(one, marks=pytest.mark.interpreted) for one in ("sm_80", "sm_100")),
    ],
)
def test_integers_are_unpacked_in_registers(target: str) -> None:
    """Into the operands of instructions that take them there, on every architecture, and nothing spills."""
    found = compiled(target, "--parts quantised mixtures --dtypes bf16")
    found = [kernel for kernel in found if kernel["kernel"] in ("int4_kernel", "grouped_int4_kernel")]
    assert len({kernel["kernel"] for kernel in found}) == 2
    instructions = {name for kernel in found for name in kernel["products"]}
    assert len(instructions) == 1
    assert instructions.pop().startswith("mma.sync")
    assert not [kernel for kernel in found if kernel["spilled"]]


@pytest.mark.interpreted
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", ALL_OF)
def test_all_compile(target: str) -> None:
    found = [kernel for options in ALL_OF[target] for kernel in compiled(target, options)]
    assert {kernel["kernel"] for kernel in found} == (NAMES - NEWER if target == "sm_80" else NAMES)
    storages = {kernel.get("storage") for kernel in found}
    assert ("fp8" in storages) == (target != "sm_80")
    if target == "sm_90":  # fp32 is for checks: there some kernels spill some words
        for kernel in found:
            most = 128 if kernel["dtype"] == "fp32" else SPILLED.get(kernel["kernel"], 0)
            assert kernel["spilled"] <= most, kernel
