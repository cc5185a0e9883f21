"""Failures: what a job that did not complete is to whoever waits for it over HTTP: a status, a code, a message.

Owns the one table of status codes, for the API's answers and for the lines of error files alike. Knows no envelope.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from jobs.reads import JobView
from jobs.states import JobState

REFUSED: Final = 400  # whatever is not in the table: something about the request itself
STATUS: Final = {
    "quota_exceeded": 429,
    "engine_crash": 500,
    "numerics": 500,
    "encode_failed": 500,
    "decode_failed": 500,
    "unstorable_output": 500,
}
UNKNOWN: Final = {"code": "failed", "message": "the job failed"}  # of a row without a reason


class Failure(NamedTuple):
    status: int
    code: str
    message: str
    param: str | None = None


def status_of(code: str) -> int:
    """`code`: of `models.Job.error` or `engine.request.RequestError`."""
    return STATUS.get(code, REFUSED)


def in_words(error: Mapping[str, Any]) -> str:
    """`models.Job.error` as one line: code, field and message, which may begin with the field itself."""
    param, message = error.get("param"), str(error["message"])
    if param and not message.startswith(f"{param}:"):
        message = f"{param}: {message}"
    return f"{error['code']}: {message}"


def failure_of(job: JobView) -> Failure | None:
    """None for a job that is completed, or has not ended."""
    if job.state is JobState.CANCELLED:
        return Failure(409, "cancelled", "the request was cancelled")
    if job.state not in (JobState.FAILED, JobState.EXPIRED):
        return None
    error = job.error or UNKNOWN
    status = 504 if job.state is JobState.EXPIRED else status_of(error["code"])
    return Failure(status, error["code"], error["message"], error.get("param"))
