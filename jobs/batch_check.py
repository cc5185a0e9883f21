"""BatchCheck: the first pass over a batch's input file: every line looked at, nothing made.

Owns what the findings of all lines amount to, and that no custom_id comes twice. The file is streamed, in blocks of
whole lines (`jobs.line_check`), of which a long file's are checked by two processes; what stays in memory is eight
bytes per line, and what was found out goes to `jobs.drafts`. custom_ids are compared by digest, and only those whose
digest comes twice are read again and compared as they are.
Refuses to know what becomes of the findings (`jobs.batch_intake`).
"""

from __future__ import annotations

import secrets
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO, Final

from jobs.batch_file import BadLine, parse_line
from jobs.drafts import DraftFile
from jobs.line_check import MAX_ERRORS, Block, Found, LineCheck, blocks, line_error
from jobs.line_checker import LineChecker
from jobs.quotas import Load
from jobs.settings import Settings

_BUCKETS: Final = 256
# More than can be told; that so many are repeated by chance alone, under a key, is out of the question.
_MAX_REPEATED: Final = 1_000
_MAX_BLOCKS: Final = 32  # that wait for the one before them

FILE_LOST: Final = line_error("file_lost", "the input file on the server's disk is gone or damaged")


@dataclass(frozen=True, slots=True)
class Findings:
    """`errors`: by line number; if there are any, the rest means nothing. `model`: of all lines, None if they
    differ."""

    errors: list[dict[str, Any]]
    load: Load
    model: str | None


_NOTHING: Final = Load(0, 0, 0)


class CustomIds:
    """The custom_ids of a file, 8 bytes each, in buckets by their digests."""

    def __init__(self) -> None:
        self._buckets = [array("Q") for _ in range(_BUCKETS)]

    def add(self, digests: bytes) -> None:
        for digest in array("Q", digests):
            self._buckets[digest % _BUCKETS].append(digest)

    def repeated(self) -> set[bytes]:
        """Digests that came more than once."""
        found: set[bytes] = set()
        for bucket in self._buckets:
            ordered = sorted(bucket)
            found.update(
                array("Q", [one]).tobytes() for one, following in pairwise(ordered) if one == following
            )
            if len(found) >= _MAX_REPEATED:
                break
        return found


def check_file(
    file: BinaryIO,
    endpoint: str,
    settings: Settings,
    *,
    known_models: frozenset[str],
    tick: Callable[[], None],
    drafts: DraftFile | None = None,
    in_two: bool = False,
) -> Findings:
    """Read the whole of `file`. `tick` is called once per block, and ends the check by raising. `drafts`: takes what
    the lines' jobs will be, and is finished when nothing was wrong. `in_two`: with the help of a second process."""
    check = LineCheck(
        endpoint,
        settings,
        known_models=known_models,
        key=secrets.token_bytes(16),
        drafts=drafts is not None,
    )
    errors: list[dict[str, Any]] = []
    ids, models = CustomIds(), set[str]()
    jobs = tokens = stored = 0
    for block, found in _in_two(file, check) if in_two else _alone(file, check):
        tick()
        if jobs + found.jobs > settings.max_batch_jobs:
            found = check.check(block, settings.max_batch_jobs - jobs)
        jobs += found.jobs
        errors += found.errors
        if len(errors) >= MAX_ERRORS or jobs > settings.max_batch_jobs:
            return Findings(errors[:MAX_ERRORS], _NOTHING, None)
        tokens += found.tokens
        stored += found.stored_bytes
        models.update(found.models)
        ids.add(found.digests)
        if drafts is not None and found.drafts and not errors:
            drafts.add(found.drafts)
    if not jobs:
        errors.append(line_error("empty_file", "the file holds no line"))
    if repeated := ids.repeated():
        file.seek(0)
        errors += _repeats(file, check, tick, repeated, MAX_ERRORS - len(errors))
        errors.sort(key=lambda one: one["line"])
    if drafts is not None and not errors:
        drafts.finish()
    return Findings(errors, Load(jobs, tokens, stored), models.pop() if len(models) == 1 else None)


def _alone(file: BinaryIO, check: LineCheck) -> Iterator[tuple[Block, Found]]:
    return ((block, check.check(block)) for block in blocks(file, check.settings))


def _in_two(file: BinaryIO, check: LineCheck) -> Iterator[tuple[Block, Found]]:
    """The same, in the same order; a second process checks what it can."""
    waiting: deque[tuple[Block, Found | None]] = deque()  # None: the other has it
    with LineChecker(check) as other:

        def first(*, wait: bool) -> Found | None:
            block, found = waiting[0]
            if found is None and (found := other.take(block, wait=wait)) is None and not other.alive:
                return check.check(block)
            return found

        for block in blocks(file, check.settings):
            waiting.append((block, None if other.offer(block) else check.check(block)))
            while waiting and (found := first(wait=len(waiting) > _MAX_BLOCKS)) is not None:
                yield waiting.popleft()[0], found
        while waiting and (found := first(wait=True)) is not None:
            yield waiting.popleft()[0], found


def _repeats(
    file: BinaryIO, check: LineCheck, tick: Callable[[], None], digests: set[bytes], limit: int
) -> Iterator[dict[str, Any]]:
    """An error for each line whose custom_id an earlier line has, at most `limit`."""
    first: dict[str, int] = {}
    for block in blocks(file, check.settings):
        tick()
        for number, _, raw in check.lines(block):
            if limit <= 0:
                return
            try:
                custom_id = "" if raw is None else parse_line(number, raw, check.endpoint).custom_id
            except BadLine:
                continue
            if not custom_id or check.digest(custom_id) not in digests:
                continue
            if custom_id in first:
                limit -= 1
                message = f"custom_id: {ascii(custom_id)[:80]} is also that of line {first[custom_id]}"
                yield line_error("duplicate_custom_id", message, number, "custom_id")
            else:
                first[custom_id] = number
