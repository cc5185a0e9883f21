"""Counted tokens: what a job counts for where work ahead is summed up.

Owns the rule: its estimate, but no more for each of its samples than the longest context that its model was ever
served with, since the engine cuts `max_tokens` to it (`engine.engine`). Otherwise one client that asks for a million
tokens, to say "as many as you like", would move everybody's forecast by hours. What models make of estimates
(`jobs.pace`) is learned under the same rule. Quotas and fair turns go by the estimate as it is. Refuses to know
speeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, case, func, select

from jobs.models import Job, Worker


def longest_contexts(connection: Connection) -> dict[str, int]:
    """By model, in tokens; without those that no worker has loaded yet."""
    lengths = select(Worker.model, func.max(Worker.max_model_len)).group_by(Worker.model)
    return {model: length for model, length in connection.execute(lengths) if length is not None}


def counted(tokens: int, num_samples: int, context: int | None) -> int:
    """Of one job, estimated at `tokens` for all of its samples; `context`: None where nobody knows."""
    return tokens if context is None else min(tokens, context * num_samples)


def counted_column(contexts: Mapping[str, int]) -> ColumnElement[Any]:
    """The same of a row of `models.Job`."""
    if not contexts:
        return Job.estimated_tokens.expression
    most = case(dict(contexts), value=Job.model, else_=Job.estimated_tokens) * Job.num_samples
    return case((Job.estimated_tokens > most, most), else_=Job.estimated_tokens)
