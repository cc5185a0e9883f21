"""The benchmark of one GPU runs through on a CPU, so that no line of it runs for the first time on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.gpu.busy import union
from tests.bench.gpu.setting import Setting
from tests.bench.gpu.workloads import nano, shared
from tests.support.tree import ROOT

SETTING = Setting(device="cpu", tiny=False, share=1.0, seconds=1.0)


def test_nano_is_nano_vllms_benchmark() -> None:
    workload = nano(SETTING)
    assert len(workload.prompts) == 256
    assert workload.num_new_tokens == 133_966  # as nano-vllm publishes it
    assert all(100 <= len(prompt) <= 1024 for prompt in workload.prompts)


def test_shared_prompts_begin_alike_and_end_apart() -> None:
    workload = shared(SETTING)
    assert len({tuple(prompt[: workload.shared]) for prompt in workload.prompts}) == 1
    assert len({tuple(prompt[workload.shared :]) for prompt in workload.prompts}) == len(workload.prompts)


def test_a_warm_up_reaches_the_longest_context_and_a_single_row() -> None:
    workload = nano(SETTING)
    warm_up = workload.warm_up()
    longest = max(len(p) + n for p, n in zip(workload.prompts, workload.new_tokens, strict=True))
    reached = [len(p) + n for p, n in zip(warm_up.prompts, warm_up.new_tokens, strict=True)]
    assert longest - 32 <= max(reached) <= longest
    assert sorted(warm_up.new_tokens) == list(range(1, 33))


def test_intervals_that_overlap_count_once() -> None:
    assert union([(0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (5.0, 6.0)]) == pytest.approx(4.0)
    assert union([]) == 0.0


def run_sections(out: Path, *names: str, **environment: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "tests.bench.gpu",
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(out),
        *names,
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout
    json.loads(done.stdout.splitlines()[-1])
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.long
def test_it_runs_through(tmp_path: Path) -> None:
    sections = run_sections(tmp_path / "result.json", "nano", "shared", "peer")["sections"]
    assert set(sections) == {"ceilings", "nano", "shared", "peer"}
    for found in (sections["nano"], sections["shared"]["cached"], sections["shared"]["uncached"]):
        assert found["roofline_share"] > 0
        assert 0 < found["gpu_busy"] <= 1
        assert found["top"]
    assert (
        sections["shared"]["cached"]["cached_tokens"] > 0 == sections["shared"]["uncached"]["cached_tokens"]
    )
    assert sections["peer"]["theirs"]["output_tok_s"] > 0


@pytest.mark.long
def test_other_tiles_are_tried(tmp_path: Path) -> None:
    sections = run_sections(tmp_path / "result.json", "tiles", TRITON_INTERPRET="1")["sections"]
    for case in sections["tiles"]["cases"]:
        assert len(case["us"]) == 2
        assert case["us"][case["own"]] > 0
