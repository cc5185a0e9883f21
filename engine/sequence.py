"""Sequence: one sample of a request while it lives in the engine.

Owns the tokens, their logprobs, how many of them are computed, and which pages hold them. Knows nothing of
the pool those pages come from, nor of other sequences. There is no phase: `num_computed` chases
`len(token_ids)`, and a chunk of a prompt, a checkpoint that is resumed, a recompute after preemption and one
decoded token are all that same catching up.
"""

from __future__ import annotations

from dataclasses import replace

from engine.logit_rules import LogitRules
from engine.matcher import Matcher
from engine.ngram_proposer import NgramProposer
from engine.request import Output, Request, TokenLogprobs, derive_seed


class Sequence:
    """`token_ids` is prompt then generated, appended to in place. `pages[i]` holds tokens i·page_size onward."""

    __slots__ = (
        "expected_tokens",
        "high_water",
        "index",
        "keys",
        "logprobs",
        "matcher",
        "max_tokens",
        "num_cached",
        "num_computed",
        "num_preemptions",
        "num_prompt",
        "num_shared_pages",
        "output",
        "pages",
        "prompt_logprobs",
        "proposer",
        "request",
        "rules",
        "seed",
        "token_ids",
    )

    def __init__(
        self, request: Request, index: int, max_tokens: int, bad_words: tuple[tuple[int, ...], ...] = ()
    ) -> None:
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
        self.high_water = 0  # the most tokens ever computed: what lies below was lost by a preemption
        self.num_cached = 0  # tokens of the prompt that were found computed when it first ran
        self.pages: list[int] = []
        self.num_shared_pages = 0  # of `pages`: found in the cache
        self.keys: list[bytes] = []  # names of its full pages, as far as somebody asked (`page_names`)
        self.expected_tokens = max_tokens  # how many it will probably generate
        self.num_preemptions = 0
        self.logprobs: list[TokenLogprobs] = []  # one per generated token, if the request asks for them
        # of the prompt's tokens from the second on, as far as they are known; None: not asked for, or not of this
        # sample, because one of them says it for all
        scores = index == 0 and sampling.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if scores else None
        self.rules = LogitRules.of(sampling, bad_words)  # None: the logits are taken as they are
        self.matcher: Matcher | None = None  # where it stands in its grammar, if the request has one
        self.proposer: NgramProposer | None = None  # from when its tokens are first guessed
        self.output: Output | None = None  # set once, when it finishes

    @property
    def runs_to_the_end(self) -> bool:
        """Whether nothing but `max_tokens` can end it."""
        sampling = self.request.sampling
        ended_by = sampling.stop or sampling.stop_token_ids or sampling.repetition_detection
        return sampling.ignore_eos and not ended_by

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_wanted(self) -> int:
        """Tokens that it may still generate."""
        return self.num_prompt + self.max_tokens - len(self.token_ids)

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def finished_output(self) -> Output | None:
        """`output`, with how it begins, and with the logprobs of the tokens it kept if the request asks for them."""
        output, request = self.output, self.request
        if output is None or (request.sampling.logprobs is None and request.begins == "answer"):
            return output
        scored = request.sampling.logprobs is not None
        logprobs = tuple(self.logprobs[: len(output.token_ids)]) if scored else None
        return replace(output, logprobs=logprobs, begins=request.begins)

    @property
    def num_reusable(self) -> int:
        """Leading tokens whose K and V may be taken from somewhere instead of being computed: not the last one, and
        none whose logits are still wanted for the logprobs of the prompt."""
        if self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt - 1:
            return len(self.prompt_logprobs)
        return len(self.token_ids) - 1

    @property
    def num_pending(self) -> int:
        """Tokens whose K and V are not computed yet; at least 1 while the sequence lives."""
        return len(self.token_ids) - self.num_computed
