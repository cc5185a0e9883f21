"""Engine: requests in, completions out, one step at a time.

Owns what a request is while it lives: its sequences, their stop strings, and the one Completion it ends in.
Synchronous and without I/O: `process` and `llm` decide when to step and where answers go. Refuses to know
pages (`scheduler`) and tensors (`runner`). What belongs to one request ends that request alone; an exception
that leaves `step` is the device's or a bug, and the engine must not be used after it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig, ModelConfig
from engine.pages import PagePool
from engine.plan import Plan
from engine.request import Completion, Output, Rejected, Request, RequestError, RequestId
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.stop import StopChecker
from engine.tokenizer import Tokenizer


class Runner(Protocol):
    """What the engine needs of `runner.ModelRunner`."""

    model_config: ModelConfig
    num_pages: int
    page_size: int
    max_model_len: int
    device: str
    dtype: str
    kernels_name: str
    deterministic: bool

    def run(self, plan: Plan) -> list[int]: ...


class _Live:
    """A request in the engine: done when no sequence is left."""

    __slots__ = ("checkers", "num_unfinished", "request", "sequences")

    def __init__(self, request: Request, sequences: list[Sequence], checkers: list[StopChecker]) -> None:
        self.request = request
        self.sequences = sequences
        self.checkers = checkers  # one per sequence, or none
        self.num_unfinished = len(sequences)

    def completion(self, *, error: RequestError | None = None, aborted: bool = False) -> Completion:
        whole = error is None and not aborted
        return Completion(
            id=self.request.id,
            outputs=tuple(s.output for s in self.sequences if s.output is not None) if whole else (),
            error=error,
            aborted=aborted,
            num_prompt=len(self.request.prompt_token_ids),
            # A finished sample counts what it kept: the surplus after a stop string is nobody's.
            num_generated=sum(
                len(s.output.token_ids) if s.output else s.num_generated for s in self.sequences
            ),
        )


class Engine:
    """`tokenizer` is needed for stop strings only. `load` makes the runner and the tokenizer too."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer | None, config: EngineConfig) -> None:
        self.config = config
        self.runner = runner
        self.tokenizer = tokenizer
        self.max_model_len = runner.max_model_len
        self.pool = PagePool(runner.num_pages, runner.page_size)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            eos_token_ids=runner.model_config.eos_token_ids,
        )
        self._live: dict[RequestId, _Live] = {}
        self._num_steps = 0
        self._busy_seconds = 0.0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_computed_tokens = 0
        self._num_finished = 0

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        """Open the checkpoint, load weights and tokenizer. Loads torch.

        Raises `UnsupportedCheckpoint`, `UnsupportedTokenizer` or `InvalidParameter`, which say why.
        """
        from engine.runner import ModelRunner

        checkpoint = Checkpoint.open(config.model, config.revision)
        return cls(ModelRunner.load(config, checkpoint), Tokenizer.open(checkpoint), config)

    # --- requests -------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def num_requests(self) -> int:
        return len(self._live)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._live

    def add(self, request: Request) -> None:
        """Queue a request. Raises `Rejected`, and then nothing has changed."""
        max_tokens = self._max_tokens(request)
        sequences = [Sequence(request, index, max_tokens) for index in range(request.sampling.n)]
        checkers = [self._checker(request) for _ in sequences] if request.sampling.stop else []
        self._live[request.id] = _Live(request, sequences, checkers)
        for sequence in sequences:
            self.scheduler.add(sequence)
        self._num_prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: RequestId) -> Completion | None:
        """End a request now; its pages are free when this returns. None when it is not here (any more)."""
        live = self._live.get(request_id)
        return None if live is None else self._leave(live, aborted=True)

    def step(self) -> list[Completion]:
        """Compute one plan. Returns the requests that ended in it; nothing to do is an empty list."""
        started = time.perf_counter()
        plan = self.scheduler.plan()
        if not plan.rows:
            return []
        tokens = self.runner.run(plan)
        drew = [row.sequence for row in plan.sampling_rows]
        self._num_steps += 1
        self._num_computed_tokens += plan.num_tokens
        self._num_generated_tokens += sum(token_id >= 0 for token_id in tokens)
        ended = self.scheduler.settle(plan, tokens)
        completions = self._stop(drew, tokens, ended)
        completions += self._settle(ended)
        self._busy_seconds += time.perf_counter() - started
        return completions

    def progress(self) -> dict[RequestId, int]:
        """Tokens generated so far by each request that is in, over all its samples."""
        return {
            request_id: sum(sequence.num_generated for sequence in live.sequences)
            for request_id, live in self._live.items()
        }

    def stats(self) -> dict[str, int | float]:
        """Counters since load, and how full it is now."""
        return {
            "num_requests": len(self._live),
            "num_running": len(self.scheduler.running),  # sequences
            "num_waiting": len(self.scheduler.waiting),
            "num_steps": self._num_steps,
            "busy_seconds": self._busy_seconds,
            "num_prompt_tokens": self._num_prompt_tokens,  # of all requests added
            "num_generated_tokens": self._num_generated_tokens,
            "num_computed_tokens": self._num_computed_tokens,  # recompute included
            "num_finished": self._num_finished,
            "num_preemptions": self.scheduler.num_preemptions,
            "num_pages": self.pool.num_pages,
            "num_free_pages": self.pool.num_free,
        }

    # --- admission ------------------------------------------------------------------------------------------

    def _max_tokens(self, request: Request) -> int:
        """How long each sample may get. Raises `Rejected` for what cannot run here."""
        prompt, sampling = request.prompt_token_ids, request.sampling
        vocab_size = self.runner.model_config.vocab_size
        if request.id in self._live:
            raise Rejected("invalid_request", f"the id {tuple(request.id)} is in the engine already")
        if not prompt:
            raise Rejected("invalid_request", "the prompt is empty: at least one token is needed")
        if sampling.seed is None:
            raise Rejected("invalid_request", "the request carries no seed")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise Rejected("invalid_request", f"the prompt has token ids outside 0 to {vocab_size - 1}")
        room = self.max_model_len - len(prompt)
        if room < 1:
            raise Rejected(
                "context_length_exceeded",
                f"the prompt has {len(prompt)} tokens; this model takes at most {self.max_model_len - 1}"
                " and needs room for one more",
            )
        if sampling.min_tokens > room:
            raise Rejected(
                "context_length_exceeded",
                f"min_tokens: the context leaves room for {room} tokens after the prompt",
            )
        # The last token drawn is never computed: it needs no slot.
        slots = self.pool.num_pages * self.pool.page_size
        wanted = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        if sampling.max_tokens is None:
            wanted = min(wanted, max(slots + 1 - len(prompt), sampling.min_tokens, 1))
        if not self.scheduler.fits(len(prompt) + wanted - 1):
            raise Rejected(
                "kv_capacity_exceeded",
                f"a prompt of {len(prompt)} and an output of {wanted} tokens need more KV memory than the"
                f" {slots} tokens this engine has",
            )
        return wanted

    def _checker(self, request: Request) -> StopChecker:
        if self.tokenizer is None:
            raise Rejected("invalid_request", "stop: this engine has no tokenizer; use stop_token_ids")
        return StopChecker(self.tokenizer, request.sampling.stop, request.sampling.min_tokens)

    # --- endings --------------------------------------------------------------------------------------------

    def _stop(self, drew: Iterable[Sequence], tokens: list[int], ended: list[Sequence]) -> list[Completion]:
        """Look for stop strings in what was drawn. They win over another ending by the same token."""
        stopped: list[Sequence] = []
        for sequence, token_id in zip(drew, tokens, strict=True):
            live = self._live[sequence.request.id]
            if not live.checkers or token_id < 0:
                continue
            running = sequence.output is None
            match = live.checkers[sequence.index].push(token_id, last=not running)
            if match is None:
                continue
            sequence.output = Output(
                token_ids=tuple(sequence.generated[: match.num_tokens]),
                finish_reason="stop",
                stop_reason=match.stop,
                text_cut=match.text_cut,
            )
            if running:
                self.scheduler.remove(sequence)
                stopped.append(sequence)
        return self._settle(stopped)

    def _settle(self, ended: Iterable[Sequence]) -> list[Completion]:
        """Count sequences that left the scheduler; a request whose last one left is complete."""
        completions: list[Completion] = []
        for sequence in ended:
            live = self._live.get(sequence.request.id)
            if live is None:  # a sibling failed in this very step
                continue
            live.num_unfinished -= 1
            if sequence.output is None:
                message = "the model's output was not finite (NaN or infinity) for this request"
                completions.append(self._leave(live, error=RequestError(code="numerics", message=message)))
            elif live.num_unfinished == 0:
                completions.append(self._leave(live))
        return completions

    def _leave(self, live: _Live, *, error: RequestError | None = None, aborted: bool = False) -> Completion:
        for sequence in live.sequences:
            if sequence.output is None:
                self.scheduler.remove(sequence)
        del self._live[live.request.id]
        self._num_finished += 1
        return live.completion(error=error, aborted=aborted)
