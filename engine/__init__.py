"""The engine: token ids in, token ids out, many sequences at once.

Offers the Python door `LLM` and `SamplingParams` (names follow vLLM's). `LLM` is loaded on first use, so that
`engine.request` and the other planning files can be imported without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.sampling_params import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams

__all__ = ["LLM", "RepetitionDetectionParams", "SamplingParams", "StructuredOutputsParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from engine import openmp

        openmp.prepare()
        from engine.llm import LLM

        return LLM
    if name in __all__:
        from engine import sampling_params

        return getattr(sampling_params, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
