"""Sequence: one sample of a request while it lives in the engine.

Owns the tokens, how many of them are computed, and which pages hold them. Knows nothing of the pool those
pages come from, nor of other sequences. There is no phase: `num_computed` chases `len(token_ids)`, and a
chunk of a prompt, a recompute after preemption and one decoded token are all that same catching up.
"""

from __future__ import annotations

from engine.request import Output, Request, derive_seed


class Sequence:
    """`token_ids` is prompt then generated, appended to in place. `pages[i]` holds tokens i·page_size onward."""

    __slots__ = (
        "index",
        "max_tokens",
        "num_computed",
        "num_preemptions",
        "num_prompt",
        "output",
        "pages",
        "request",
        "seed",
        "token_ids",
    )

    def __init__(self, request: Request, index: int, max_tokens: int) -> None:
        sampling = request.sampling
        if sampling.seed is None:
            raise ValueError("a request must carry a seed before it becomes a sequence")
        self.request = request
        self.index = index  # which of the n samples
        self.max_tokens = max_tokens  # what the request asked for, or what the context leaves
        self.seed = sampling.seed if index == 0 else derive_seed(sampling.seed, index)
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt = len(request.prompt_token_ids)
        self.num_computed = 0
        self.pages: list[int] = []
        self.num_preemptions = 0
        self.output: Output | None = None  # set once, when it finishes

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def num_pending(self) -> int:
        """Tokens whose K and V are not computed yet; at least 1 while the sequence lives."""
        return len(self.token_ids) - self.num_computed
