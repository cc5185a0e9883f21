"""Worker: the parts of one worker process put together, their start and their end.

Owns the wiring between Celery's side (arrivals, revokes, results, wake-ups), the engine's side (supervisor,
checkpointer, broadcast) and SQL's side (claimer, writer, lease keeper, sweeper, timekeeper), and the order in which
they stop. Each part owns its thread; none of them knows another, they meet here. No torch is loaded in this process.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from engine.checkpoint import Checkpoint
from engine.reasoning import format_of
from engine.request import Completion, RequestId
from engine.tokenizer import Tokenizer
from engine.wire import Hello
from jobs.answers import outcome_of, outcome_of_death
from jobs.arrivals import Arrivals
from jobs.audience import Audience
from jobs.body import JobBody
from jobs.broadcast import Broadcast
from jobs.broker import NightpressCelery
from jobs.celery_results import CeleryResults
from jobs.checkpointer import Checkpointer
from jobs.claimer import Claimer
from jobs.database import Database, cause
from jobs.encoder import Encoder
from jobs.exposition import MetricsServer, serve
from jobs.holdings import Holding, Holdings
from jobs.intake import Intake
from jobs.lease_keeper import LeaseKeeper
from jobs.leases import leave, new_worker_id, register
from jobs.outcomes import Outcome, Recorded
from jobs.pace import Pace, last_known
from jobs.quarantine import SUSPECT
from jobs.revokes import Revokes
from jobs.settings import Settings
from jobs.states import TERMINAL, JobState
from jobs.supervisor import EngineSupervisor
from jobs.sweeper import Sweeper
from jobs.teller import Teller
from jobs.timekeeper import Timekeeper
from jobs.wakeups import WakeUps
from jobs.worker_metrics import WorkerMetrics
from jobs.worker_report import WorkerReport
from jobs.writer import Writer

log = logging.getLogger(__name__)

LEAVE_SECONDS = 3.0
FLUSH_SECONDS = 3.0  # for the last checkpoints of an engine that died
HAND_BACK_SECONDS = 10.0  # for the engine to answer aborts, and for SQL to take them, at the end of a drain


class Worker:
    """`start` and `drain` are called from the main thread, everything else from any."""

    def __init__(
        self,
        settings: Settings,
        app: NightpressCelery,
        *,
        on_hopeless: Callable[[str], None],
        is_revoked: Callable[[str], bool],
    ) -> None:
        checkpoint = Checkpoint.open(
            settings.model, settings.engine.revision, model_impl=settings.engine.model_impl
        )
        self.tokenizer = Tokenizer.open(checkpoint)
        self.reasoning = format_of(self.tokenizer, settings.engine.reasoning_parser)
        self.settings = settings
        self.model = settings.served_model
        self.worker_id = new_worker_id()
        self.database = Database(settings.database)
        self.holdings = Holdings()
        self.draining = False
        self._started = False
        # A side's callbacks may name parts of the others: they are called when all are there.
        self._make_celery_side(app, is_revoked)
        weights = checkpoint.fingerprint()
        self._make_engine_side(weights, on_hopeless)
        self._make_sql_side(weights)
        self.metrics = WorkerMetrics(
            self.model,
            figures=lambda: self.supervisor.figures,
            is_up=lambda: self.supervisor.hello is not None and not self.draining,
            num_starts=lambda: self.supervisor.num_starts,
            num_held=lambda: len(self.holdings),
        )
        self._metrics_server: MetricsServer | None = None

    def _name(self) -> str:
        """For parts that must write under the name of this moment: it changes when a lease is lost."""
        return self.worker_id

    def _make_celery_side(self, app: NightpressCelery, is_revoked: Callable[[str], bool]) -> None:
        """What comes from Redis, and what is said there."""
        self.results = CeleryResults(app)
        self.teller = Teller(self.database, self.results)
        self.results.on_told = self.teller.told
        self.wake_ups = WakeUps(app, self.database)
        self.revokes = Revokes(self.database, self.results, on_cancelling=lambda: self.keeper.poke())
        self.arrivals = Arrivals(
            self.database,
            self.settings,
            self.results,
            on_jobs=self._on_arrived,
            is_revoked=is_revoked,
            cancel=lambda job_id: self.revokes.put([job_id], running=False),
        )

    def _make_engine_side(self, weights: str, on_hopeless: Callable[[str], None]) -> None:
        """The engine process, and what is made of what it says while it runs."""
        self.checkpointer = Checkpointer(self.database, self.holdings, self._name, weights)
        self.broadcast = Broadcast(self.settings.redis, self.tokenizer, self._stop_of, self.reasoning)
        self.supervisor = EngineSupervisor(
            self.settings.engine_config(),
            checkpoint_seconds=self.settings.checkpoint_seconds,
            on_ready=self._on_ready,
            on_completions=self._on_completions,
            on_progress=self.holdings.progress,
            on_grown=self.checkpointer.put,
            on_streamed=self.broadcast.put,
            on_death=self._on_death,
            on_hopeless=on_hopeless,
        )
        self.report = WorkerReport(self.supervisor, is_draining=lambda: self.draining)

    def _make_sql_side(self, weights: str) -> None:
        """Jobs in and outcomes out, under a lease; and the two loops that every process has."""
        settings = self.settings
        places = settings.engine.max_num_seqs
        self.writer = Writer(self.database, self.holdings, self._name, self._on_recorded, weights)
        self.claimer = Claimer(
            self.database,
            self.holdings,
            self.supervisor,
            model=self.model,
            worker_id=self._name,
            encode=Encoder(self.tokenizer, settings, self.reasoning).encode,
            finish=self.writer.put,
            on_more=lambda: self.wake_ups.repeat(self.model),
            window=settings.claim_window * places,
            places=places,
            reserve=max(1, places // 4),
            weights=weights,
        )
        self.keeper = LeaseKeeper(
            self.database,
            self.holdings,
            worker_id=self._name,
            lease_seconds=settings.lease_seconds,
            renew_seconds=settings.renew_seconds,
            report=self.report.columns,
            end=self._end,
            finish=self.writer.put,
            on_lost=self._on_lost,
            on_renewed=lambda: self.supervisor.kill_if_stalled(
                settings.stall_seconds, settings.start_seconds
            ),
        )
        self.sweeper = Sweeper(self.database, settings.sweep_seconds, self._announce, also=self.teller.sweep)
        self.timekeeper = Timekeeper(
            self.database, Intake(self.database, settings), settings.sweep_seconds, self._announce
        )

    # --- life -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Register and start every thread. Raises when SQL cannot be reached."""
        self.database.transact(lambda connection: self._register(connection, self.worker_id))
        with self.database.read() as connection:
            known = last_known(connection, model=self.model, host=socket.gethostname())
        self.report.pace = Pace(known)
        log.info("worker.start id=%s model=%s", self.worker_id, self.model)
        threads = (self.results, self.writer, self.checkpointer, self.supervisor, self.claimer, self.keeper)
        for thread in (*threads, self.broadcast, self.sweeper, self.timekeeper):
            thread.start()
        self.arrivals.start()
        self.revokes.start()
        self._metrics_server = serve(self.metrics.registry, self.settings)
        self._started = True

    def drain(self, grace_seconds: float) -> None:
        """Claim nothing more, let what runs finish for `grace_seconds`, hand the rest back at once, leave."""
        if self.draining or not self._started:
            return
        self.draining = True
        log.info("worker.drain held=%d grace=%.0f", len(self.holdings), grace_seconds)
        deadline = time.monotonic() + grace_seconds
        self.arrivals.stop(HAND_BACK_SECONDS)
        self.claimer.stop()
        self.keeper.poke()
        for holding in self.holdings.all():  # what has not begun can begin elsewhere right now
            if holding.num_generated == 0:
                self._end(holding)
        self.holdings.wait_empty(max(0.0, deadline - time.monotonic()))
        for holding in self.holdings.all():
            self._end(holding)
        if not self.holdings.wait_empty(HAND_BACK_SECONDS):
            log.error("worker.drain_incomplete held=%d", len(self.holdings))
        self.supervisor.stop()
        self.timekeeper.stop()
        self.sweeper.stop()
        self.checkpointer.stop()
        self.writer.stop(HAND_BACK_SECONDS)
        self.broadcast.stop(HAND_BACK_SECONDS)
        self.keeper.stop()
        try:
            self.database.transact(
                lambda connection: leave(connection, worker_id=self.worker_id), patience=LEAVE_SECONDS
            )
        except SQLAlchemyError as error:  # then its lease runs out instead
            log.error("worker.leave_failed error=%s", cause(error))
        self.revokes.stop(HAND_BACK_SECONDS)
        self.wake_ups.wake(self.model)  # for whoever takes over what was handed back
        self.wake_ups.close()
        self.results.stop(HAND_BACK_SECONDS)
        if self._metrics_server is not None:
            self._metrics_server.stop()
        self.database.close()
        log.info("worker.left id=%s", self.worker_id)

    def _register(self, connection: Connection, worker_id: str) -> None:
        register(
            connection,
            worker_id=worker_id,
            model=self.model,
            lease_seconds=self.settings.lease_seconds,
        )

    # --- doors ----------------------------------------------------------------------------------------------

    def wake(self) -> None:
        self.claimer.wake()

    def cancel(self, job_ids: Sequence[str], *, running: bool) -> None:
        """Cancel in SQL; a job that runs only if `running`. Returns at once."""
        self.revokes.put(job_ids, running=running)

    # --- SQL's side -------------------------------------------------------------------------------------------

    def _stop_of(self, request_id: RequestId) -> Sequence[str] | None:
        holding = self.holdings.get(request_id)
        return None if holding is None else JobBody.model_validate(holding.claim.body).stop or ()

    def _end(self, holding: Holding) -> None:
        """Abort one job wherever it is; its state in SQL says whether that is a cancel or a hand-back."""
        if self.holdings.mark_dropped(holding):
            self.writer.put(Outcome(job_id=holding.claim.job_id, fence=holding.claim.fence, kind="released"))
        else:
            self.supervisor.abort([holding.id])

    def _on_recorded(self, recorded: list[Recorded]) -> None:
        self.metrics.recorded(recorded)
        for item in recorded:
            if item.audience != Audience.NOBODY:
                name = RequestId(item.outcome.job_id, item.outcome.fence)
                self.broadcast.over(name, ended=item.state in TERMINAL)
            if item.source == "redis" and item.state in (
                JobState.COMPLETED,
                JobState.FAILED,
                JobState.CANCELLED,
            ):
                self.results.ended(item)
        self.claimer.on_ended([item.outcome.job_id for item in recorded if item.state in TERMINAL])
        if not self.draining:
            if any(item.state is JobState.QUEUED for item in recorded):
                self.claimer.wake()
            self.claimer.on_room()

    def _on_lost(self) -> None:
        """A sweeper took our jobs: forget them, stop computing them, come back under a new name."""
        self.metrics.lost_lease()
        held = self.holdings.all()
        self.holdings.clear()
        self.broadcast.forget()
        self.supervisor.abort([holding.id for holding in held if holding.sent])
        if not self.draining:
            name = new_worker_id()
            self.database.transact(lambda connection: self._register(connection, name))
            self.worker_id = name  # only now: until then claims carry the lost name, which sweepers know
            self.claimer.wake()

    def _on_arrived(self, models: set[str]) -> None:
        for model in models:
            self._announce(model)

    def _announce(self, model: str) -> None:
        if model == self.model:
            self.claimer.wake()
        else:
            self.wake_ups.wake(model)

    # --- the engine's side --------------------------------------------------------------------------------------

    def _on_ready(self, hello: Hello) -> None:
        self.report.pace.context = hello.max_model_len
        self.keeper.poke()
        self.claimer.wake()

    def _on_completions(self, completions: Sequence[Completion]) -> None:
        for completion in completions:
            if holding := self.holdings.get(completion.id):
                chat = "messages" in holding.claim.body
                outcome = outcome_of(completion, self.tokenizer, self.reasoning, chat=chat)
                self.writer.put(outcome)
                if outcome.kind == "completed":
                    made = outcome.prompt_tokens - outcome.cached_tokens + outcome.completion_tokens
                    self.report.pace.completed(
                        computed_tokens=made,
                        estimated_tokens=holding.claim.estimated_tokens,
                        num_samples=holding.claim.num_samples,
                    )

    def _on_death(self, returncode: int, ids: tuple[RequestId, ...], stalled: bool) -> None:
        alone = len(ids) == 1 and self.claimer.were_on_trial(ids)
        self.checkpointer.flush(FLUSH_SECONDS)  # what it had told of before it died
        holdings = [holding for request_id in ids if (holding := self.holdings.get(request_id))]
        outcomes = [
            outcome_of_death(holding, returncode, stalled=stalled, alone=alone) for holding in holdings
        ]
        self.claimer.on_suspects([o.job_id for o in outcomes if (o.crashes or 0) >= SUSPECT])
        for outcome in outcomes:
            self.writer.put(outcome)
        self.keeper.poke()
