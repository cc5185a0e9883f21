"""Engine: requests in, completions out, one step at a time.

Owns which requests are in, which `Run` answers each, and the one Completion each ends in. Synchronous and without
I/O: `process` and `llm` decide when to step and where answers go. Refuses to know pages (`scheduler`) and
tensors (`runner`). What belongs to one request ends that request alone; an exception that leaves `step` or `check`
is the device's or a bug, and the engine must not be used after it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Protocol

from engine.admission import Limits
from engine.checkpoint import Checkpoint
from engine.compiling import Compiling
from engine.config import EngineConfig
from engine.endings import failure
from engine.figures import Figures
from engine.flight import Flight
from engine.grammars import Grammars
from engine.growth import Growth
from engine.model_config import ModelConfig
from engine.pages import PagePool, require
from engine.plan import Launched, Plan
from engine.reasoning import format_of
from engine.request import Completion, Generated, Rejected, Request, RequestError, RequestId
from engine.run import Run, identity
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.step_times import StepTimes
from engine.stop import StopChecker
from engine.telling import Telling
from engine.tokenizer import Tokenizer
from engine.vocabulary import bad_word_ids

COMPILE_WAIT_SECONDS = 0.05  # a step with nothing to compute waits so long for a grammar


class Runner(Protocol):
    """What the engine needs of `runner.ModelRunner`."""

    model_config: ModelConfig
    num_pages: int
    page_size: int
    max_model_len: int
    num_host_pages: int
    num_scheduler_steps: int
    num_speculative_tokens: int
    max_num_batched_tokens: int
    seconds_per_page_moved: float | None
    device: str
    dtype: str
    kernels_name: str
    deterministic: bool
    times: StepTimes

    def launch(self, plan: Plan) -> Launched: ...


class Engine:
    """`tokenizer` is needed for stop strings, bad words and structured outputs only. `load` makes the runner and the
    tokenizer too."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer | None, config: EngineConfig) -> None:
        self.config = config
        self.runner = runner
        self.tokenizer = tokenizer
        self.max_model_len = runner.max_model_len
        self.pool = PagePool(runner.num_pages, runner.page_size)
        num_slots = runner.num_pages * runner.page_size
        self._limits = Limits(runner.model_config, runner.max_model_len, num_slots)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens or runner.max_num_batched_tokens,
            eos_token_ids=runner.model_config.eos_token_ids,
            prefix_caching=config.enable_prefix_caching,
            policy=config.scheduling_policy,
            num_host_pages=runner.num_host_pages,
            most_steps=runner.num_scheduler_steps,
            num_speculative_tokens=runner.num_speculative_tokens,
            keeps=self._swap_pays,
        )
        self._flight = Flight(runner, self.scheduler)
        self._runs: dict[RequestId, Run] = {}
        self._checkpoints = Telling()
        self._streams = Telling()  # of requests that somebody reads along
        self._run_of: dict[Sequence, Run] = {}
        self._by_identity: dict[Hashable, Run] = {}
        self._compiling: Compiling | None = None  # runs that wait for their grammar; None: nobody has asked
        self._over: dict[Run, None] = {}  # ended by what they were resumed with, in their order
        self.reasoning = format_of(tokenizer, config.reasoning_parser) if tokenizer else None
        self._figures = Figures()

    @classmethod
    def load(cls, config: EngineConfig, *, bar: bool = False) -> Engine:
        """Open the checkpoint, its tokenizer, then load the weights. Loads torch. `bar`: show how far it is on
        stderr, if that is a terminal; else the log tells.

        Raises `UnsupportedCheckpoint`, `UnsupportedTokenizer` or `InvalidParameter`, which say why.
        """
        from engine.runner import ModelRunner

        checkpoint = Checkpoint.open(config.model, config.revision, model_impl=config.model_impl)
        tokenizer = Tokenizer.open(checkpoint)  # first: what is wrong with it is told before weights are read
        format_of(tokenizer, config.reasoning_parser)
        return cls(ModelRunner.load(config, checkpoint, bar=bar), tokenizer, config)

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
        if request.id in self._runs:
            raise Rejected("invalid_request", f"the id {tuple(request.id)} is in the engine already")
        max_tokens = self._limits.admit(request)
        run = self._by_identity.get(identity(request))
        if run is not None and run.serves(request):
            run.requests[request.id] = request
        else:
            run = self._begin(request, max_tokens)
        self._runs[request.id] = run
        nothing = (0,) * len(run.sequences)
        self._checkpoints.begin(
            request.id, tuple(len(made.token_ids) for made in request.generated) or nothing
        )
        if request.stream:
            self._streams.begin(request.id, nothing)
        self._figures.num_prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: RequestId) -> Completion | None:
        """End a request now; its pages are free when this returns, unless somebody else has asked for the same.
        None when it is not here (any more)."""
        run = self._runs.get(request_id)
        if run is None:
            return None
        if len(run.requests) == 1:
            return self._leave(run, aborted=True)[0]
        completion = run.completion(run.requests[request_id], aborted=True)
        del run.requests[request_id]
        self._forget(request_id)
        self._figures.ended([completion])
        return completion

    def step(self) -> list[Completion]:
        """Compute one plan. Returns the requests that ended in it; nothing to do is an empty list. While all wait for
        their grammars it waits with them for a moment, so that a caller's loop does not spin."""
        completions = [completion for run in list(self._over) for completion in self._leave(run)]
        completions += self._compiled()
        landed = self._flight.next()
        if landed is None:
            if self._compiling and not completions:
                self._compiling.wait(COMPILE_WAIT_SECONDS)
            return completions
        plan, draws = landed
        drawing = [(row.sequence, len(row.sequence.token_ids)) for row in plan.sampling_rows]
        ended = self.scheduler.settle(plan, *draws)
        num_drawn = sum(len(sequence.token_ids) - before for sequence, before in drawing)
        completions += self._settle(self._stopped(drawing))
        completions += self._settle(ended)
        self._figures.took(self.runner.times.stop(), plan.num_tokens, num_drawn)
        return completions

    def progress(self) -> dict[RequestId, int]:
        """Tokens generated so far by each request that has any, over all its samples."""
        return {request_id: made for request_id, run in self._runs.items() if (made := run.num_generated)}

    def generated(self, request_id: RequestId) -> tuple[Generated, ...]:
        """A checkpoint of a request: what each sample has made so far. Put into `Request.generated`, the request
        goes on as if it had never been interrupted. Raises KeyError when it is not here."""
        return self._runs[request_id].generated

    def grown(self) -> list[Growth]:
        """What each request has made since the last call, or since its checkpoint; those that made nothing are
        left out. All growths of a request, put together, are a checkpoint."""
        return self._checkpoints.grown(self._runs)

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def streamed(self) -> list[Growth]:
        """Tokens of requests with `stream` that are new since the last call, from the first one on, also of a request
        that goes on from a checkpoint. A sample's last tokens come with the completion only."""
        return self._streams.streamed(self._runs)

    def check(self) -> None:
        """Raise AssertionError when pages, contents, queues or requests contradict each other."""
        self.scheduler.check()
        unfinished = {s for run in self._runs.values() for s in run.sequences if s.output is None}
        queued = {*self.scheduler.running, *self.scheduler.waiting, *self.scheduler.warming}
        compiling = set(self._compiling or ())
        require(not queued & compiling, "a sequence runs without its grammar")
        queued |= compiling
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
            "num_compiling": len(self._compiling or ()),  # runs that wait for their grammar
            **self._figures.counters(),
            **self.runner.times.counters(),  # of busy_seconds
            **scheduler.speculation.counters(),
            "num_recomputed_tokens": scheduler.num_recomputed,
            "num_preemptions": scheduler.num_preemptions,
            "num_pages": self.pool.num_pages,
            "num_free_pages": self.pool.num_free,
            "num_cached_pages": self.pool.num_cached,
            "num_swapped_out_pages": cache.num_swapped_out,
            "num_swapped_in_pages": cache.num_swapped_in,
        }

    # --- beginnings -----------------------------------------------------------------------------------------

    def _begin(self, request: Request, max_tokens: int) -> Run:
        """Make the request's own run and let it wait, for its grammar or for its turn. Raises `Rejected`."""
        sampling = request.sampling
        compiling = self._grammar_threads() if sampling.structured_outputs is not None else None
        bad_words = bad_word_ids(self.tokenizer, sampling.bad_words)
        sequences = [Sequence(request, index, max_tokens, bad_words) for index in range(sampling.n)]
        checkers = [self._checker(request) for _ in sequences] if sampling.stop else []
        run = Run(request, sequences, checkers)
        self._by_identity[run.identity] = run
        self._run_of.update(dict.fromkeys(sequences, run))
        live = [sequence for sequence in sequences if not self._resumed(run, sequence)]
        run.num_unfinished = len(live)
        if not live:
            self._over[run] = None
        elif compiling is not None:
            compiling.add(run, live)
        else:
            for sequence in live:
                self.scheduler.add(sequence)
        return run

    def _grammar_threads(self) -> Compiling:
        """Raises `Rejected` where no grammar can be honoured."""
        if self._compiling is None:
            model = self.runner.model_config
            if self.tokenizer is None or not model.eos_token_ids:
                missing = "tokenizer" if self.tokenizer is None else "end of sequence among its tokens"
                raise Rejected("invalid_request", f"structured_outputs: this engine has no {missing}")
            grammars = Grammars(self.tokenizer, model.vocab_size, model.eos_token_ids, self.reasoning)
            self._compiling = Compiling(grammars)
        return self._compiling

    def _compiled(self) -> list[Completion]:
        """Let those in whose grammar is ready; the answers of those whose grammar cannot be."""
        completions: list[Completion] = []
        for run, sequences, error in self._compiling.take() if self._compiling else ():
            self._figures.num_steps += 1  # it moves, though nothing may be computed
            if error:
                completions += self._leave(run, error=error)
                continue
            for sequence in sequences:
                self.scheduler.add(sequence)
        return completions

    def _checker(self, request: Request) -> StopChecker:
        if self.tokenizer is None:
            raise Rejected("invalid_request", "stop: this engine has no tokenizer; use stop_token_ids")
        splitter = self.reasoning.splitter(request.begins) if self.reasoning else None
        return StopChecker(self.tokenizer, request.sampling.stop, request.sampling.min_tokens, splitter)

    def _resumed(self, run: Run, sequence: Sequence) -> bool:
        """Give a new sequence the tokens of its checkpoint, as if it had just made them; True if they end it.
        Whatever comes behind such an end is dropped."""
        if not sequence.request.generated:
            return False
        made = sequence.request.generated[sequence.index]
        sequence.logprobs += made.logprobs
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs += made.prompt_logprobs
        for token_id in made.token_ids:
            sequence.token_ids.append(token_id)
            sequence.output = self.scheduler.ending(sequence, token_id)
            if run.stop(sequence, [token_id]) or sequence.output is not None:
                return True
        return False

    # --- endings --------------------------------------------------------------------------------------------

    def _stopped(self, drawing: Iterable[tuple[Sequence, int]]) -> list[Sequence]:
        """Those that a stop string ended and nothing else did, taken out of the scheduler. `drawing`: who drew, and
        how many tokens each had before."""
        stopped: list[Sequence] = []
        for sequence, before in drawing:
            run = self._run_of[sequence]
            if not run.checkers:
                continue
            running, drawn = sequence.output is None, sequence.token_ids[before:]
            if drawn and run.stop(sequence, drawn) and running:
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
                completions += self._leave(run, error=failure(sequence))
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
        self._over.pop(run, None)
        if self._compiling:
            self._compiling.remove(run)
        if self._by_identity.get(run.identity) is run:
            del self._by_identity[run.identity]
        completions = [
            run.completion(request, error=error, aborted=aborted) for request in run.requests.values()
        ]
        for request_id in run.requests:
            self._forget(request_id)
        run.requests = {}
        self._figures.ended(completions)
        return completions

    def _forget(self, request_id: RequestId) -> None:
        del self._runs[request_id]
        self._checkpoints.end(request_id)
        self._streams.end(request_id)

    def _swap_pays(self) -> bool:
        """Whether moving a page out and in again costs less than computing its tokens again, as measured."""
        if self.config.preemption_mode != "auto":
            return self.config.preemption_mode == "swap"
        moved, computed = self.runner.seconds_per_page_moved, self._figures.seconds_per_token
        return moved is not None and (computed is None or moved < computed * self.pool.page_size)
