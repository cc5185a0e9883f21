"""Run: one generation in the engine, and everybody who has asked for it.

Owns the sequences of a request while it lives, their stop strings, and how they become completions. Requests that
ask for the very same thing (tokens, parameters, seed, salt) share one run: it is computed once and each gets its own
completion. Knows neither pages nor steps (`scheduler`, `engine`).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from engine.request import Completion, Generated, Output, Request, RequestError, RequestId
from engine.sequence import Sequence
from engine.stop import StopChecker
from engine.waiting import rank_of


def identity(request: Request) -> Hashable:
    """Equal for requests whose outputs are equal: a greedy one has no use for its seed."""
    sampling = replace(request.sampling, seed=0) if request.sampling.greedy else request.sampling
    return request.prompt_token_ids, sampling, request.cache_salt, request.generated, request.begins


class Run:
    """`checkers`: one per sequence, or none when no stop strings were asked for."""

    __slots__ = ("checkers", "identity", "num_unfinished", "requests", "sequences")

    def __init__(self, request: Request, sequences: list[Sequence], checkers: list[StopChecker]) -> None:
        self.requests: dict[RequestId, Request] = {request.id: request}  # who asked, the first one first
        self.identity = identity(request)
        self.sequences = sequences
        self.checkers = checkers
        self.num_unfinished = len(sequences)

    @property
    def num_generated(self) -> int:
        """Of all samples."""
        return sum(self.counts)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each sample. A finished one counts what it kept: the surplus after a stop string is nobody's."""
        return tuple(len(s.output.token_ids) if s.output else s.num_generated for s in self.sequences)

    @property
    def generated(self) -> tuple[Generated, ...]:
        """A checkpoint: what each sample has so far."""
        return self.generated_since((0,) * len(self.sequences))

    def generated_since(self, starts: tuple[int, ...]) -> tuple[Generated, ...]:
        """The same, from token `starts[k]` of sample k on."""
        return tuple(
            Generated(
                token_ids=tuple(s.token_ids[s.num_prompt + start : s.num_prompt + count]),
                logprobs=tuple(s.logprobs[start:count]),
                prompt_logprobs=() if start else tuple(s.prompt_logprobs or ()),
            )
            for s, start, count in zip(self.sequences, starts, self.counts, strict=True)
        )

    def serves(self, request: Request) -> bool:
        """Whether it runs as soon as `request`, whose identity is the same, would run by itself."""
        return rank_of(self.sequences[0].request) <= rank_of(request)

    def stop(self, sequence: Sequence, token_ids: list[int]) -> bool:
        """Take the tokens that `sequence` just got; if one completes a stop string, that is how the sample ends, even
        if it ended in another way too. Later ones do not count."""
        if not self.checkers:
            return False
        match = None
        for left, token_id in zip(range(len(token_ids) - 1, -1, -1), token_ids, strict=True):
            last = left == 0 and sequence.output is not None
            match = self.checkers[sequence.index].push(token_id, last=last)
            if match is not None:
                break
        if match is None:
            return False
        kept = sequence.request.sampling.include_stop_str_in_output
        sequence.output = Output(
            token_ids=tuple(sequence.generated[: match.num_tokens]),
            finish_reason="stop",
            stop_reason=match.stop,
            text_cut=match.text_cut + (len(match.stop) if kept else 0),
        )
        return True

    def completion(
        self, request: Request, *, error: RequestError | None = None, aborted: bool = False
    ) -> Completion:
        """The answer to `request`, one of those who asked."""
        whole = error is None and not aborted
        first = next(iter(self.requests)) == request.id
        num_prompt = len(request.prompt_token_ids)
        scores = self.sequences[0].prompt_logprobs
        return Completion(
            id=request.id,
            outputs=tuple(filter(None, (s.finished_output for s in self.sequences))) if whole else (),
            error=error,
            aborted=aborted,
            generated=self.generated if aborted and self.num_generated else (),
            num_prompt=num_prompt,
            num_generated=self.num_generated,
            num_cached_tokens=min(s.num_cached for s in self.sequences) if first else num_prompt,
            prompt_logprobs=(None, *scores) if whole and scores is not None else None,
        )
