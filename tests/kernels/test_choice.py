"""Which kernel set is chosen, and that the C library is built safely."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import kernels_for
from kernels.cpu import build
from kernels.cpu import kernels as cpu_kernels

QUICK = ("-O0", *build.FLAGS[1:])  # built in a seventh of the time, where how it is built is not the question


def test_auto_takes_the_fast_set_on_a_cpu() -> None:
    assert kernels_for("cpu").name == "cpu"
    assert kernels_for("cpu", "reference").name == "reference"


def test_unknown_and_impossible_names_are_refused() -> None:
    with pytest.raises(ValueError, match="auto, reference, cpu or triton"):
        kernels_for("cpu", "fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot run on cuda"):
        kernels_for("cuda", "cpu")


def test_without_a_compiler_the_reference_set_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with caplog.at_level(logging.WARNING):
        assert kernels_for("cpu", "cpu").name == "reference"
    assert "no C compiler" in caplog.text


def test_a_failing_compiler_is_reported_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\necho this machine is out of bits >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="out of bits"):
        cpu_kernels()


def test_every_included_file_counts_for_the_binary() -> None:
    """A header that the key forgets would leave an old binary in use."""
    included = set(re.findall(r'^#include "(.*)"', build.SOURCE.read_text(), re.MULTILINE))
    assert included == {path.name for path in (build.SOURCE, *build.INCLUDED)}


@pytest.mark.long
def test_processes_that_build_at_once_all_get_a_whole_library(tmp_path: Path) -> None:
    code = (
        f"import torch; from kernels import kernels_for; from kernels.cpu import build; build.FLAGS = {QUICK};"
        "k = kernels_for('cpu', 'cpu'); x = k.rms_norm(torch.ones(2, 32), torch.ones(32), 0.0);"
        "assert k.name == 'cpu' and torch.equal(x, torch.ones(2, 32)), (k.name, x)"
    )
    root = Path(__file__).parents[2]
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(root)}
    builders = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for builder in builders:
        _, errors = builder.communicate(timeout=120)
        assert builder.returncode == 0, errors
    left = sorted(path.name for path in (tmp_path / ".cache" / "nightpress").iterdir())
    assert len(left) == 1, left


def test_a_damaged_binary_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", QUICK)
    folder = build.cache_folder()
    assert folder.is_relative_to(tmp_path)
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None
    damaged = folder / f"kernels-{build._key(compiler, (*QUICK, '-fopenmp'))}.so"
    damaged.write_bytes(b"not a library")
    x = torch.ones(1, 32)
    assert torch.equal(cpu_kernels().rms_norm(x, torch.ones(32), 0.0), x)
    assert damaged.stat().st_size > 1000
