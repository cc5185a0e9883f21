"""Conditions: which rows the partial indexes of `jobs.models` hold, in the very words of those indexes.

Owns the wording. A partial index serves only a statement that visibly implies its condition, and a bound parameter
implies nothing; so these are literals. Whoever asks for such rows takes the condition from here.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import ColumnElement, literal_column

from jobs.states import JobState
from jobs.terms import DELAYED

JOB_QUEUED: Final[ColumnElement[bool]] = literal_column(f"jobs.state = '{JobState.QUEUED}'")
JOB_DELAYED: Final[ColumnElement[bool]] = literal_column(f"jobs.tier >= {DELAYED}")
JOB_UNFINISHED: Final[ColumnElement[bool]] = literal_column("jobs.finished_at IS NULL")
JOB_HAS_DEADLINE: Final[ColumnElement[bool]] = literal_column("jobs.deadline IS NOT NULL")
JOB_FROM_REDIS: Final[ColumnElement[bool]] = literal_column("jobs.source = 'redis'")
BATCH_UNFINISHED: Final[ColumnElement[bool]] = literal_column("batches.finished_at IS NULL")
