"""RunFiles: what the two files of a run-batch hold before it begins.

Owns the rule that an output file which was cut short can be gone on with: what has a whole line is done. Refuses to
know what a request asks for and how it is answered (`jobs.batch_file`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from jobs.batch_file import OUTPUT_START, BadLine, is_blank, parse_line

MAX_SHOWN: Final = 10  # of many mistakes


class BatchFileError(ValueError):
    """A file that cannot be used at all; the message says why."""


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not is_blank(raw):
                yield number, raw


def check_input(path: Path) -> int:
    """How many lines the input has. Raises `BatchFileError` when two requests share a custom_id, because
    then no answer could be told from the other."""
    seen: dict[str, int] = {}
    twice: list[str] = []
    count = 0
    for number, raw in read_lines(path):
        count += 1
        try:
            custom_id = parse_line(number, raw).custom_id
        except BadLine as error:
            if error.custom_id is None:
                continue
            custom_id = error.custom_id
        if custom_id in seen:
            twice.append(f"lines {seen[custom_id]} and {number}: {custom_id[:80]!r}")
        else:
            seen[custom_id] = number
    if twice:
        more = f"\n  and {len(twice) - MAX_SHOWN} more" if len(twice) > MAX_SHOWN else ""
        raise BatchFileError(f"{path} uses a custom_id twice:\n  " + "\n  ".join(twice[:MAX_SHOWN]) + more)
    return count


@dataclass(slots=True)
class Done:
    """What an output file already holds."""

    custom_ids: set[str] = field(default_factory=set)
    bad_lines: set[int] = field(default_factory=set)  # of the input without a custom_id, by number
    num_failed: int = 0

    def __len__(self) -> int:
        return len(self.custom_ids) + len(self.bad_lines)


def _foreign(path: Path, number: int) -> BatchFileError:
    return BatchFileError(f"{path} line {number} is not a line of batch output; name another file")


def resume(path: Path) -> Done:
    """Read an output file and cut off a last line that a crash left unfinished. Raises `BatchFileError` for a
    file that is not ours to append to."""
    done = Done()
    if not path.exists():
        return done
    whole = 0
    with path.open("rb+") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                if raw[: len(OUTPUT_START)] != OUTPUT_START[: len(raw)]:
                    raise _foreign(path, number)
                break
            whole += len(raw)
            try:
                data = json.loads(raw)
                custom_id, response, error = data["custom_id"], data["response"], data["error"]
                if custom_id is None:
                    done.bad_lines.add(int(error["line"]))
                else:
                    done.custom_ids.add(str(custom_id))
                done.num_failed += response is None or response["status_code"] != 200
            except (ValueError, KeyError, TypeError):
                raise _foreign(path, number) from None
        file.truncate(whole)
    return done
