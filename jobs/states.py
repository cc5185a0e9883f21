"""The states of a job and of a batch, and who moves them. Nothing else; every other file asks this one.

            claimer                    writer
  queued ───────────► in_progress ───────────────► completed | failed
    │  ▲                 │    │
    │  └─────────────────┘    │ cancel
    │   sweeper (lease lost)  ▼
    │   worker (drain,     cancelling ───────────► cancelled | expired
    │   engine death,         writer, or the sweeper when the worker is dead
    │   retry after a failure)
    │
    └──────────────► cancelled (cancel)      queued ──► expired (sweeper, past the deadline)

Past its deadline a held job is told to stop in the way of a cancel, and ends as `expired`.
A batch of a file; one of an array begins at in_progress and has no finalizing:

              clerk                 last job ends               clerk
  validating ───────► in_progress ─────────────────► finalizing ───────► completed | expired
    │   │                  │                             │               | failed (its file got lost)
    │   └──► failed        └─────────► cancelling ◄──────┘ cancel
    │        (bad line)                    │
    └──► cancelled (cancel)                └───► cancelled (clerk, when its output is written)

A terminal state never changes: whoever moves a job names the state it moves from in the UPDATE or has locked its row
and looked, a worker by the fence of its claim, too; and triggers in the database refuse what would get past both.
"""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class BatchState(StrEnum):
    """OpenAI's eight words. `validating` and `finalizing` belong to file batches."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class WorkerState(StrEnum):
    STARTING = "starting"  # loading the model
    READY = "ready"
    DRAINING = "draining"  # SIGTERM: claims nothing more
    STOPPED = "stopped"  # left in good order
    LOST = "lost"  # swept: its lease expired; it must take a new name to go on


class LedgerKind(StrEnum):
    BILLED = "billed"  # one per result, the same numbers
    CANCELLED = "cancelled"  # made before a cancel took effect
    WASTED = "wasted"  # made by an attempt that did not end in a result


TERMINAL = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})
OPEN = frozenset(JobState) - TERMINAL
HELD = frozenset({JobState.IN_PROGRESS, JobState.CANCELLING})  # a worker's name stands on it
LIVE_WORKER = frozenset({WorkerState.STARTING, WorkerState.READY, WorkerState.DRAINING})
