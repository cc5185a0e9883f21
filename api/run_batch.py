"""run-batch: a file of requests through one engine process, without Redis and without SQL.

Owns the loop between the two files and the engine: it keeps the engine's credits used, appends each answer as it
comes (`api.run_output`), starts a dead engine again, and stops so that the same command goes on where it was. The
output file is the only state. No torch here: that is the engine process's.
"""

from __future__ import annotations

import fcntl
import queue
import signal
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from api.cli_client import INTERRUPTED
from api.run_output import RunOutput
from engine.checkpoint import Checkpoint
from engine.growth import Growth, join
from engine.reasoning import format_of
from engine.request import Completion, Request, RequestId, derive_seed
from engine.tokenizer import Tokenizer
from engine.wire import Completions, FromEngine, Grown, Progress
from jobs.answers import outcome_of, param_of
from jobs.bad_field import BadField
from jobs.batch_file import (
    BadLine,
    BatchLine,
    answer_line,
    bad_line,
    error_line,
    parse_line,
)
from jobs.engine_process import EngineProcess
from jobs.failures import status_of
from jobs.openai_answers import usage_object
from jobs.openai_body import CHAT
from jobs.quarantine import SUSPECT, Quarantine, is_guilty, suspicion_after
from jobs.requests import prompt_of, request_of
from jobs.run_files import (
    BatchFileError,
    Done,
    check_input,
    read_lines,
    resume,
)
from jobs.settings import Settings

LOOK_SECONDS = 0.2  # how soon a Ctrl-C is seen
STOP_SECONDS = 5.0
FILL = 64  # requests encoded before answers are looked at again
MAX_FAILED_STARTS = 3
LONG_QUEUE = 32_768  # requests that the engine plans over, until it has died once


@dataclass(slots=True)
class Entry:
    """One request that is encoded. `suspicion`: of killing engines (`jobs.quarantine`). `growths`: what it has
    made, to go on from after a death; `num_resumed` of them it was handed in with."""

    line: BatchLine
    request: Request
    suspicion: int = 0
    growths: list[Growth] = field(default_factory=list)
    num_resumed: int = 0

    @property
    def name(self) -> str:
        return self.request.id.job_id


@dataclass(frozen=True, slots=True)
class Exit:
    returncode: int
    ids: tuple[RequestId, ...]


def run(settings: Settings, source: Path, target: Path, *, quiet: bool = False) -> int:
    """Answer every request of `source` that has no line in `target` yet; returns the exit status."""
    if target.exists() and target.samefile(source):
        return _say("input and output are the same file", 1)
    try:
        total = check_input(source)
        engine = settings.engine
        checkpoint = Checkpoint.open(settings.model, engine.revision, model_impl=engine.model_impl)
        tokenizer = Tokenizer.open(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return _say(f"{target} is being written by another run", 1)
            done = resume(target)
            output = RunOutput(file, done, total, quiet=quiet)
            return BatchRun(settings, tokenizer, source, done, output, quiet=quiet).run()
    except (BatchFileError, ValueError, OSError) as error:  # checkpoints and tokenizers say ValueError
        return _say(str(error), 1)


class BatchRun:
    def __init__(
        self,
        settings: Settings,
        tokenizer: Tokenizer,
        source: Path,
        done: Done,
        output: RunOutput,
        *,
        quiet: bool,
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._reasoning = format_of(tokenizer, settings.engine.reasoning_parser)
        self._output = output
        self._done = done
        self._quiet = quiet
        self._entries = self._read(source)
        self._again: deque[Entry] = deque()  # after a death
        self._suspects: dict[str, Entry] = {}  # of one, not in the engine
        self._quarantine = Quarantine()
        self._in_flight: dict[RequestId, Entry] = {}
        self._messages: queue.SimpleQueue[FromEngine | Exit] = queue.SimpleQueue()
        self._process: EngineProcess | None = None
        self._failed_starts = 0
        self._deaths = 0
        self._exhausted = False
        self._stopping = False
        self._partial = 0  # tokens of requests in flight

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            while not self._stopping and not self._finished():
                self._fill()
                if self._in_flight or self._process is not None:
                    self._wait()
        except StartFailed as error:
            return _say(f"the engine cannot start: {error}", 1)
        finally:
            if self._process is not None:
                self._process.stop(STOP_SECONDS)
                self._take_rest()
            self._output.close()
        return self._report()

    # --- requests -------------------------------------------------------------------------------------------

    def _read(self, source: Path) -> Iterator[Entry]:
        """Encoded requests that have no answer yet. Lines that cannot be one are answered here."""
        for number, raw in read_lines(source):
            try:
                line = parse_line(number, raw)
            except BadLine as error:
                if number not in self._done.bad_lines and error.custom_id not in self._done.custom_ids:
                    self._output.write(bad_line(number, error), failed=True)
                continue
            if line.custom_id in self._done.custom_ids:
                continue
            try:
                yield self._encode(line)
            except BadField as error:
                self._output.write(
                    error_line(line, 400, str(error), code=error.code, param=error.param), failed=True
                )
            except ValueError as error:  # a chat that the template refuses
                self._output.write(error_line(line, 400, str(error), code="invalid_request"), failed=True)

    def _encode(self, line: BatchLine) -> Entry:
        body = line.job(self._settings)
        # From the custom_id, so that a request draws the same tokens whenever its turn comes.
        seed = derive_seed("batch", line.custom_id) if body.seed is None else body.seed
        request = request_of(
            RequestId(f"line-{line.number}", 1),
            body,
            prompt_of(body, self._tokenizer),
            seed=seed,
            settings=self._settings,
            tenant="",  # one file, one owner
            reasoning=self._reasoning,
        )
        return Entry(line, request)

    def _next(self) -> Entry | None:
        if self._again:
            return self._again.popleft()
        entry = next(self._entries, None)
        self._exhausted = self._exhausted or entry is None
        return entry

    def _fill(self) -> None:
        """Use the engine's credits. Suspects of an engine death have the engine to themselves."""
        if self._process is None:
            if not self._suspects:
                first = self._next()  # a file with nothing left to do needs no engine
                if first is None:
                    return
                self._again.appendleft(first)
            self._start()
            return
        if self._on_trial:
            return
        room = min(self._process.available_credits, FILL)
        chosen: list[Entry] = []
        if not self._suspects:
            while len(chosen) < room and (entry := self._next()) is not None:
                chosen.append(entry)
        elif not self._in_flight:
            names = self._quarantine.next_group(self._suspects)[: self._process.available_credits]
            chosen = [self._suspects.pop(name) for name in names]
        if chosen:
            self._in_flight |= {entry.request.id: entry for entry in chosen}
            self._process.add(entry.request for entry in chosen)

    def _finished(self) -> bool:
        return self._exhausted and not self._again and not self._suspects and not self._in_flight

    # --- engine ---------------------------------------------------------------------------------------------

    def _start(self) -> None:
        config = self._settings.engine_config()
        if config.max_num_requests is None and not self._deaths:
            config = replace(config, max_num_requests=LONG_QUEUE)
        self._process = EngineProcess(
            config,
            checkpoint_seconds=self._settings.checkpoint_seconds,
            on_message=self._messages.put,
            on_exit=lambda returncode, ids: self._messages.put(Exit(returncode, ids)),
            bar=not self._quiet,
        )
        self._process.start()

    def _wait(self) -> None:
        try:
            message = self._messages.get(timeout=0 if self._can_add() else LOOK_SECONDS)
        except queue.Empty:
            return
        self._take(message)

    def _can_add(self) -> bool:
        if self._process is None or self._suspects or self._on_trial:
            return False
        return (bool(self._again) or not self._exhausted) and self._process.available_credits > 0

    @property
    def _on_trial(self) -> bool:
        """Whether suspects have the engine to themselves. Before the first death there are none."""
        return self._deaths > 0 and any(entry.suspicion >= SUSPECT for entry in self._in_flight.values())

    def _take(self, message: FromEngine | Exit) -> None:
        match message:
            case Completions():
                for completion in message.completions:
                    self._answer(completion)
                self._output.flush()
            case Progress():
                self._partial = sum(message.num_generated.values())
            case Grown():
                for growth in message.growths:
                    if entry := self._in_flight.get(growth.id):
                        entry.growths.append(growth)
            case Exit():
                self._died(message)
        self._output.show_rate(self._partial)

    def _take_rest(self) -> None:
        """Answers that were on their way when the run was stopped; whatever was aborted stays undone."""
        while True:
            try:
                message = self._messages.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, Completions):
                for completion in message.completions:
                    self._answer(completion)

    def _answer(self, completion: Completion) -> None:
        entry = self._in_flight.pop(completion.id, None)
        if entry is None:
            return None
        if completion.aborted:
            self._again.append(entry)
            return None
        self._quarantine.ended([entry.name])
        chat = entry.line.url == CHAT
        if (error := completion.error) is not None:
            return self._fail(entry, error.code, error.message, param_of(error, chat=chat))
        outcome = outcome_of(completion, self._tokenizer, self._reasoning, chat=chat)
        if outcome.error is not None:
            return self._fail(entry, outcome.error["code"], outcome.error["message"])
        self._output.count(prompt_tokens=outcome.prompt_tokens, generated_tokens=outcome.completion_tokens)
        usage = usage_object(
            outcome.prompt_tokens, outcome.completion_tokens, outcome.cached_tokens, outcome.outputs
        )
        self._output.write(answer_line(entry.line, self._settings.served_model, outcome.outputs, usage))

    def _fail(self, entry: Entry, code: str, message: str, param: str | None = None) -> None:
        told = error_line(entry.line, status_of(code), message, code=code, param=param)
        self._output.write(told, failed=True)

    def _died(self, end: Exit) -> None:
        process, self._process = self._process, None
        self._partial = 0
        assert process is not None
        if process.hello is None:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS or process.fatal is not None:
                raise StartFailed(
                    process.fatal.reason if process.fatal else f"it ended with {end.returncode}"
                )
        else:
            self._failed_starts = 0
            self._deaths += 1
        entries = [self._in_flight.pop(request_id) for request_id in end.ids]
        alone = len(entries) == 1 and entries[0].suspicion >= SUSPECT
        for entry in entries:
            before, progressed = entry.suspicion, len(entry.growths) > entry.num_resumed
            entry.suspicion = suspicion_after(before, end.returncode, stalled=False, progressed=progressed)
            entry.request = replace(entry.request, generated=join(entry.growths))
            entry.num_resumed = len(entry.growths)
            if alone and is_guilty(before, entry.suspicion, progressed=progressed):
                reason = f"the engine process died ({end.returncode}) while running this request alone"
                self._fail(entry, "engine_crash", reason)
            elif entry.suspicion >= SUSPECT:
                self._suspects[entry.name] = entry
            else:
                self._again.append(entry)
        self._quarantine.died([entry.name for entry in entries if entry.name in self._suspects])
        self._output.say(f"the engine ended with status {end.returncode}, starting it again")

    # --- end ------------------------------------------------------------------------------------------------

    def _report(self) -> int:
        summary = self._output.summary()
        if self._stopping and not self._finished():
            return _say(f"interrupted: {summary}. The same command goes on from here.", INTERRUPTED)
        if self._output.first_failure:
            summary += f"; the first failure: {self._output.first_failure}"
        return _say(summary, 1 if self._output.num_failed else 0)

    def _on_signal(self, number: int, frame: object) -> None:
        self._stopping = True


class StartFailed(RuntimeError):
    """No engine process says Hello."""


def _say(line: str, status: int) -> int:
    sys.stderr.write(f"nightpress: {line}\n")
    return status
