"""BatchCheck: the first pass over a batch's input file: every line looked at, nothing made.

Owns the validation: what counts as a line, which codes a wrong one gets, and that no custom_id comes twice. The file
is streamed; what stays in memory is eight bytes per line, and what was found out goes to `jobs.drafts`.
custom_ids are compared by hash, and only those whose hash comes twice are read again and compared as they are.
Refuses to know what becomes of the findings (`jobs.batch_intake`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, BinaryIO, Final

from jobs.batch_file import BadLine, BatchLine, bounded_lines, parse_line
from jobs.body import BadField
from jobs.drafts import DraftFile, draft_of
from jobs.quotas import Load
from jobs.settings import Settings

MAX_ERRORS: Final = 100  # told; the check stops there
WRAPPER_BYTES: Final = 8_192  # of a line beside its body
_BUCKETS: Final = 256
# More than can be told; that so many are repeated by chance alone, under a keyed hash, is out of the question.
_MAX_REPEATED: Final = 1_000


def line_error(code: str, message: str, line: int | None = None, param: str | None = None) -> dict[str, Any]:
    """One entry of OpenAI's `errors.data`."""
    return {"code": code, "line": line, "message": message, "param": param}


FILE_LOST: Final = line_error("file_lost", "the input file on the server's disk is gone or damaged")


@dataclass(frozen=True, slots=True)
class Findings:
    """`errors`: by line number; if there are any, the rest means nothing. `model`: of all lines, None if they
    differ."""

    errors: list[dict[str, Any]]
    load: Load
    model: str | None


class CustomIds:
    """The custom_ids of a file, 8 bytes each, in buckets by their hash."""

    def __init__(self) -> None:
        self._buckets = [array("Q") for _ in range(_BUCKETS)]

    def add(self, custom_id: str) -> None:
        # Python's own hash is keyed anew in every process, so nobody can aim at it.
        digest = hash(custom_id) & 0xFFFF_FFFF_FFFF_FFFF
        self._buckets[digest % _BUCKETS].append(digest)

    def repeated(self) -> set[int]:
        """Hashes that came more than once."""
        found: set[int] = set()
        for bucket in self._buckets:
            ordered = sorted(bucket)
            found.update(one for one, following in pairwise(ordered) if one == following)
            if len(found) >= _MAX_REPEATED:
                break
        return found


@dataclass(slots=True)
class _Models:
    """`known`: names that are or were served; empty: nobody knows any, and every name may turn out right."""

    known: frozenset[str]
    seen: set[str] = field(default_factory=set)

    def check(self, model: str) -> None:
        if self.known and model not in self.known:
            raise BadField("model", "no worker serves this model or has served it", "model_not_found")
        if len(self.seen) < 2:
            self.seen.add(model)


def check_file(
    file: BinaryIO,
    endpoint: str,
    settings: Settings,
    *,
    known_models: frozenset[str],
    tick: Callable[[], None],
    drafts: DraftFile | None = None,
) -> Findings:
    """Read the whole of `file`. `tick` is called once per line, and ends the check by raising. `drafts`: takes what
    the lines' jobs will be, and is finished when nothing was wrong."""
    errors: list[dict[str, Any]] = []
    ids, models = CustomIds(), _Models(known_models)
    jobs = tokens = stored = 0
    for number, end, raw in _lines(file, settings, tick):
        jobs += 1
        if jobs > settings.max_batch_jobs:
            errors.append(
                line_error(
                    "too_many_tasks", f"a file may hold at most {settings.max_batch_jobs} lines", number
                )
            )
            return Findings(errors, Load(0, 0, 0), None)
        try:
            line = _parse(number, raw, endpoint, settings)
            ids.add(line.custom_id)
            body = line.named_job(settings)
            models.check(str(body.model))
        except BadLine as error:
            errors.append(line_error(error.code, str(error), number, error.param))
        except BadField as error:
            errors.append(_field_error(error, number))
        else:
            draft = draft_of(body, settings)
            tokens += draft.estimated_tokens
            stored += len(draft.body)
            if drafts is not None:
                drafts.add(end, draft)
        if len(errors) >= MAX_ERRORS:
            return Findings(errors, Load(0, 0, 0), None)
    if not jobs:
        errors.append(line_error("empty_file", "the file holds no line"))
    if repeated := ids.repeated():
        file.seek(0)
        errors += _repeats(_lines(file, settings, tick), repeated, endpoint, MAX_ERRORS - len(errors))
        errors.sort(key=lambda one: one["line"])
    if drafts is not None and not errors:
        drafts.finish()
    return Findings(errors, Load(jobs, tokens, stored), models.seen.pop() if len(models.seen) == 1 else None)


def max_line_bytes(settings: Settings) -> int:
    return settings.max_body_bytes + WRAPPER_BYTES


def _lines(
    file: BinaryIO, settings: Settings, tick: Callable[[], None]
) -> Iterator[tuple[int, int, bytes | None]]:
    """Number, where it ends (unless one before was too long), and bytes of every line that is not blank."""
    end = 0
    for number, raw in enumerate(bounded_lines(file, max_line_bytes(settings)), 1):
        tick()
        end += len(raw or b"")
        if raw is None or raw.strip():
            yield number, end, raw


def _parse(number: int, raw: bytes | None, endpoint: str, settings: Settings) -> BatchLine:
    if raw is None:
        raise BadLine(f"is longer than {max_line_bytes(settings)} bytes")
    return parse_line(number, raw, endpoint)


def _field_error(error: BadField, number: int) -> dict[str, Any]:
    # `named_job` puts the line's custom_id among the body's fields; the body's own is unknown there.
    own = error.param == "custom_id" and error.code != "unknown_parameter"
    param = "custom_id" if own else f"body.{error.param}" if error.param else "body"
    code = error.code if error.code == "model_not_found" else "invalid_request"
    return line_error(code, f"{param}: {error.message}", number, param)


def _repeats(
    lines: Iterator[tuple[int, int, bytes | None]], hashes: set[int], endpoint: str, limit: int
) -> Iterator[dict[str, Any]]:
    """An error for each line whose custom_id an earlier line has, at most `limit`."""
    first: dict[str, int] = {}
    for number, _, raw in lines:
        if limit <= 0:
            return
        try:
            custom_id = "" if raw is None else parse_line(number, raw, endpoint).custom_id
        except BadLine:
            continue
        if not custom_id or hash(custom_id) & 0xFFFF_FFFF_FFFF_FFFF not in hashes:
            continue
        if custom_id in first:
            limit -= 1
            message = f"custom_id: {ascii(custom_id)[:80]} is also that of line {first[custom_id]}"
            yield line_error("duplicate_custom_id", message, number, "custom_id")
        else:
            first[custom_id] = number
