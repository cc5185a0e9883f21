"""Engine: requests in, completions out, one step at a time.

Owns which requests are in, which `Run` answers each, and the one Completion each ends in. Synchronous and without
I/O: `process` and `llm` decide when to step and where answers go. Refuses to know pages (`scheduler`) and
tensors (`runner`). What belongs to one request ends that request alone; an exception that leaves `step` or `check`
is the device's or a bug, and the engine must not be used after it.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
from typing import Protocol

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig, ModelConfig
from engine.pages import PagePool, require
from engine.plan import Draws, Plan
from engine.request import Completion, Generated, Rejected, Request, RequestError, RequestId
from engine.run import Run, identity
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.stop import StopChecker
from engine.tokenizer import Tokenizer
from engine.vocabulary import bad_word_ids, check_vocabulary

PROMPT_STEP = 64  # tokens from which on a step's time says what computing a prompt costs


class Runner(Protocol):
    """What the engine needs of `runner.ModelRunner`."""

    model_config: ModelConfig
    num_pages: int
    page_size: int
    max_model_len: int
    num_host_pages: int
    seconds_per_page_moved: float | None
    device: str
    dtype: str
    kernels_name: str
    deterministic: bool

    def run(self, plan: Plan) -> Draws: ...


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
            prefix_caching=config.enable_prefix_caching,
            policy=config.scheduling_policy,
            num_host_pages=runner.num_host_pages,
            keeps=self._swap_pays,
        )
        self._runs: dict[RequestId, Run] = {}
        self._run_of: dict[Sequence, Run] = {}
        self._by_identity: dict[Hashable, Run] = {}
        self._over: list[Run] = []  # ended by what they were resumed with
        self._seconds_per_token: float | None = None  # of steps that compute prompts
        self._num_steps = 0
        self._busy_seconds = 0.0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
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
        return bool(self._runs)

    @property
    def num_requests(self) -> int:
        return len(self._runs)

    @property
    def request_ids(self) -> list[RequestId]:
        return list(self._runs)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._runs

    def add(self, request: Request) -> None:
        """Queue a request. Raises `Rejected`, and then nothing has changed."""
        max_tokens = self._max_tokens(request)
        run = self._by_identity.get(identity(request))
        if run is not None and run.serves(request):
            run.requests[request.id] = request
        else:
            bad_words = bad_word_ids(self.tokenizer, request.sampling.bad_words)
            sequences = [
                Sequence(request, index, max_tokens, bad_words) for index in range(request.sampling.n)
            ]
            checkers = [self._checker(request) for _ in sequences] if request.sampling.stop else []
            run = Run(request, sequences, checkers)
            self._by_identity[run.identity] = run
            for sequence in sequences:
                self._run_of[sequence] = run
                if self._resumed(run, sequence):
                    run.num_unfinished -= 1
                else:
                    self.scheduler.add(sequence)
            if run.num_unfinished == 0:
                self._over.append(run)
        self._runs[request.id] = run
        self._num_prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: RequestId) -> Completion | None:
        """End a request now; its pages are free when this returns, unless somebody else has asked for the same.
        None when it is not here (any more)."""
        run = self._runs.get(request_id)
        if run is None:
            return None
        if len(run.requests) == 1:
            return self._leave(run, aborted=True)[0]
        completion = run.completion(run.requests[request_id], aborted=True)
        del run.requests[request_id], self._runs[request_id]
        self._num_finished += 1
        return completion

    def step(self) -> list[Completion]:
        """Compute one plan. Returns the requests that ended in it; nothing to do is an empty list."""
        completions = [completion for run in self._over for completion in self._leave(run)]
        self._over = []
        started = time.perf_counter()
        plan = self.scheduler.plan()
        if not plan.rows:
            return completions
        tokens, logprobs = self.runner.run(plan)
        drew = [row.sequence for row in plan.sampling_rows]
        self._num_steps += 1
        self._num_computed_tokens += plan.num_tokens
        self._num_generated_tokens += sum(token_id >= 0 for token_id in tokens)
        ended = self.scheduler.settle(plan, tokens, logprobs)
        completions += self._settle(self._stopped(drew, tokens))
        completions += self._settle(ended)
        self._took(time.perf_counter() - started, plan.num_tokens)
        return completions

    def progress(self) -> dict[RequestId, int]:
        """Tokens generated so far by each request that has any, over all its samples."""
        return {request_id: made for request_id, run in self._runs.items() if (made := run.num_generated)}

    def generated(self, request_id: RequestId) -> tuple[Generated, ...]:
        """A checkpoint of a request: what each sample has made so far. Put into `Request.generated`, the request
        goes on as if it had never been interrupted. Raises KeyError when it is not here."""
        return self._runs[request_id].generated

    def check(self) -> None:
        """Raise AssertionError when pages, contents, queues or requests contradict each other."""
        self.scheduler.check()
        unfinished = {s for run in self._runs.values() for s in run.sequences if s.output is None}
        queued = {*self.scheduler.running, *self.scheduler.waiting, *self.scheduler.warming}
        require(unfinished == queued, "a sequence belongs to no request, or to none that runs")
        require(
            set(self._by_identity.values()) <= set(self._runs.values()),
            "a run is known that nobody waits for",
        )
        for request_id, run in self._runs.items():
            require(request_id in run.requests, f"the request {tuple(request_id)} is not known to its run")

    def stats(self) -> dict[str, int | float]:
        """Counters since load, and how full it is now."""
        scheduler, cache = self.scheduler, self.scheduler.cache
        return {
            "num_requests": len(self._runs),
            "num_running": len(scheduler.running),  # sequences
            "num_waiting": scheduler.num_waiting,
            "num_steps": self._num_steps,
            "busy_seconds": self._busy_seconds,
            "num_prompt_tokens": self._num_prompt_tokens,  # of all requests added
            "num_cached_tokens": self._num_cached_tokens,  # of those that ended: what needed no computing
            "num_generated_tokens": self._num_generated_tokens,
            "num_computed_tokens": self._num_computed_tokens,  # recompute included
            "num_recomputed_tokens": scheduler.num_recomputed,
            "num_finished": self._num_finished,
            "num_preemptions": scheduler.num_preemptions,
            "num_pages": self.pool.num_pages,
            "num_free_pages": self.pool.num_free,
            "num_cached_pages": self.pool.num_cached,
            "num_swapped_out_pages": cache.num_swapped_out,
            "num_swapped_in_pages": cache.num_swapped_in,
        }

    # --- admission ------------------------------------------------------------------------------------------

    def _max_tokens(self, request: Request) -> int:
        """How long each sample may get. Raises `Rejected` for what cannot run here."""
        prompt, sampling = request.prompt_token_ids, request.sampling
        model = self.runner.model_config
        if request.id in self._runs:
            raise Rejected("invalid_request", f"the id {tuple(request.id)} is in the engine already")
        if not prompt:
            raise Rejected("invalid_request", "the prompt is empty: at least one token is needed")
        if sampling.seed is None:
            raise Rejected("invalid_request", "the request carries no seed")
        check_vocabulary(request, model.vocab_size, model.eos_token_ids)
        if request.generated and len(request.generated) != sampling.n:
            raise Rejected(
                "invalid_request", f"generated: must have one entry for each of {sampling.n} samples"
            )
        for sample in request.generated:
            wanted = 0 if sampling.logprobs is None else len(sample.token_ids)
            if len(sample.logprobs) != wanted:
                raise Rejected("invalid_request", f"generated: {wanted} logprobs are needed for these tokens")
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

    def _resumed(self, run: Run, sequence: Sequence) -> bool:
        """Give a new sequence the tokens of its checkpoint, as if it had just made them; True if they end it.
        Whatever comes behind such an end is dropped."""
        if not sequence.request.generated:
            return False
        made = sequence.request.generated[sequence.index]
        sequence.logprobs += made.logprobs
        for token_id in made.token_ids:
            sequence.token_ids.append(token_id)
            sequence.output = self.scheduler.ending(sequence, token_id)
            if run.stop(sequence, token_id) or sequence.output is not None:
                return True
        return False

    # --- endings --------------------------------------------------------------------------------------------

    def _stopped(self, drew: Iterable[Sequence], tokens: list[int]) -> list[Sequence]:
        """Those that a stop string ended and nothing else did, taken out of the scheduler."""
        stopped: list[Sequence] = []
        for sequence, token_id in zip(drew, tokens, strict=True):
            running = sequence.output is None
            if token_id >= 0 and self._run_of[sequence].stop(sequence, token_id) and running:
                self.scheduler.remove(sequence)
                stopped.append(sequence)
        return stopped

    def _settle(self, ended: Iterable[Sequence]) -> list[Completion]:
        """Count sequences that left the scheduler; a request whose last one left is complete."""
        completions: list[Completion] = []
        for sequence in ended:
            run = self._run_of.get(sequence)
            if run is None:  # a sibling failed in this very step
                continue
            run.num_unfinished -= 1
            if sequence.output is None:
                message = "the model's output was not finite (NaN or infinity) for this request"
                completions += self._leave(run, error=RequestError(code="numerics", message=message))
            elif run.num_unfinished == 0:
                completions += self._leave(run)
        return completions

    def _leave(
        self, run: Run, *, error: RequestError | None = None, aborted: bool = False
    ) -> list[Completion]:
        """The run is over; one completion for each who asked for it."""
        for sequence in run.sequences:
            self._run_of.pop(sequence, None)
            if sequence.output is None:
                self.scheduler.remove(sequence)
        if self._by_identity.get(run.identity) is run:
            del self._by_identity[run.identity]
        completions = [
            run.completion(request, error=error, aborted=aborted) for request in run.requests.values()
        ]
        for request_id in run.requests:
            del self._runs[request_id]
        run.requests = {}
        self._num_finished += len(completions)
        self._num_cached_tokens += sum(completion.num_cached_tokens for completion in completions)
        return completions

    # --- rates ----------------------------------------------------------------------------------------------

    def _took(self, seconds: float, num_tokens: int) -> None:
        self._busy_seconds += seconds
        if num_tokens >= PROMPT_STEP:
            rate, before = seconds / num_tokens, self._seconds_per_token
            self._seconds_per_token = rate if before is None else 0.9 * before + 0.1 * rate

    def _swap_pays(self) -> bool:
        """Whether moving a page out and in again costs less than computing its tokens again, as measured."""
        if self.config.preemption_mode != "auto":
            return self.config.preemption_mode == "swap"
        moved, computed = self.runner.seconds_per_page_moved, self._seconds_per_token
        return moved is not None and (computed is None or moved < computed * self.pool.page_size)
