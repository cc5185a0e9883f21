"""Our folder `kernels` shares its name with a distribution that transformers probes for.

It is harmless unless that distribution's metadata says 0.18.2 ≤ version < 0.19: then transformers' own models
fail to import.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from tests.support.tree import ROOT

RUN_BOTH = """
import pathlib, kernels, torch
from transformers import LlamaConfig, LlamaForCausalLM
assert pathlib.Path(kernels.__file__).parent == pathlib.Path.cwd() / "kernels", kernels.__file__
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                     num_attention_heads=4, num_key_value_heads=2)
with torch.inference_mode():
    logits = LlamaForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits
assert logits.shape == (1, 3, 64)
print("ran")
"""


@pytest.mark.long
def test_transformers_runs_beside_our_kernels() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_BOTH], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.stdout.strip() == "ran", done.stderr


def test_no_version_in_the_window() -> None:
    import kernels

    versions = [getattr(kernels, "__version__", None)]
    try:
        versions.append(importlib.metadata.version("kernels"))
    except importlib.metadata.PackageNotFoundError:
        versions.append(None)
    assert not [version for version in versions if version and version.startswith("0.18")]
