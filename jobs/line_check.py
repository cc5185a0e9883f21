"""LineCheck: some whole lines of a batch's input file, looked at by themselves.

Owns what counts as a line and which codes a wrong one gets. A block of lines needs nothing of the others to be
checked, so blocks may be checked in any order and in several processes (`jobs.line_checker`). custom_ids leave as
digests under a key of the whole check, at which nobody can aim. Refuses to know files, SQL and what the findings of
all blocks amount to (`jobs.batch_check`); it loads nothing of the database, so that a process for it starts quickly.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any, BinaryIO, Final, NamedTuple

from jobs.bad_field import BadField
from jobs.batch_file import BadLine, BatchLine, bounded_lines, is_blank, parse_line
from jobs.drafts import Draft, by_column, draft_of
from jobs.settings import Settings

MAX_ERRORS: Final = 100  # told; the check stops there
WRAPPER_BYTES: Final = 8_192  # of a line beside its body
BLOCK_BYTES: Final = 1 << 17  # of lines that are checked in one go; the last of them may be longer
DIGEST_BYTES: Final = 8  # by chance alone, two of a million custom_ids share theirs once in 40 million files


class Block(NamedTuple):
    """Whole lines. `number`: of the first, from 1; `begin`: its byte in the file."""

    number: int
    begin: int
    raw: bytes


class Found(NamedTuple):
    """Of a block: `errors` by line number, at most `MAX_ERRORS`; `jobs`: lines that are not blank; `models`: up to
    two of their names; `digests`: of the custom_ids, in their order; `drafts`: as `Drafts.packed` makes them."""

    errors: tuple[dict[str, Any], ...]
    jobs: int
    tokens: int
    stored_bytes: int
    models: tuple[str, ...]
    digests: bytes
    drafts: bytes


def line_error(code: str, message: str, line: int | None = None, param: str | None = None) -> dict[str, Any]:
    """One entry of OpenAI's `errors.data`."""
    return {"code": code, "line": line, "message": message, "param": param}


def max_line_bytes(settings: Settings) -> int:
    return settings.max_body_bytes + WRAPPER_BYTES


def blocks(file: BinaryIO, settings: Settings) -> Iterator[Block]:
    """The whole of `file`, from where it is. What is too long for a line is cut, and is too long still."""
    number, begin, most = 1, 0, max_line_bytes(settings)
    while raw := file.read(BLOCK_BYTES):
        if not raw.endswith(b"\n"):
            raw += (rest := file.readline(most + 1))
            if len(rest) > most and not rest.endswith(b"\n"):
                while (rest := file.readline(most + 1)) and not rest.endswith(b"\n"):
                    pass
                raw += b"\n"
        yield Block(number, begin, raw)
        number += raw.count(b"\n")
        begin += len(raw)


class LineCheck:
    """What is asked of every line of one file. `known_models`: names that are or were served; empty: nobody knows
    any, and every name may turn out right. `key`: of the digests."""

    def __init__(
        self, endpoint: str, settings: Settings, *, known_models: frozenset[str], key: bytes, drafts: bool
    ) -> None:
        self.endpoint = endpoint
        self.settings = settings
        self.known_models = known_models
        self.key = key
        self.drafts = drafts

    def digest(self, custom_id: str) -> bytes:
        return hashlib.blake2b(custom_id.encode(), digest_size=DIGEST_BYTES, key=self.key).digest()

    def lines(self, block: Block) -> Iterator[tuple[int, int, bytes | None]]:
        """Number, where it ends (unless one before was too long), and bytes of every line that is not blank."""
        end = block.begin
        found = bounded_lines(io.BytesIO(block.raw), max_line_bytes(self.settings))
        for number, raw in enumerate(found, block.number):
            end += len(raw or b"")
            if raw is None or not is_blank(raw):
                yield number, end, raw

    def check(self, block: Block, most: int | None = None) -> Found:
        """`most`: as many lines may still come."""
        settings = self.settings
        errors: list[dict[str, Any]] = []
        drafts: list[tuple[int, Draft]] = []
        models: set[str] = set()
        digests: list[bytes] = []
        jobs = tokens = stored = 0
        for number, end, raw in self.lines(block):
            jobs += 1
            if most is not None and jobs > most:
                limit = f"a file may hold at most {settings.max_batch_jobs} lines"
                errors.append(line_error("too_many_tasks", limit, number))
                break
            try:
                line = self._parse(number, raw)
                digests.append(self.digest(line.custom_id))
                body = line.named_job(settings)
                self._check_model(str(body.model))
            except BadLine as error:
                errors.append(line_error(error.code, str(error), number, error.param))
            except BadField as error:
                errors.append(_field_error(error, number))
            else:
                draft = draft_of(body, settings)
                if len(models) < 2:
                    models.add(draft.model)
                tokens += draft.estimated_tokens
                stored += len(draft.body)
                if self.drafts:
                    drafts.append((end, draft))
            if len(errors) >= MAX_ERRORS:
                break
        frame = by_column(drafts).packed() if drafts and not errors else b""
        return Found(tuple(errors), jobs, tokens, stored, tuple(models), b"".join(digests), frame)

    def _parse(self, number: int, raw: bytes | None) -> BatchLine:
        if raw is None:
            raise BadLine(f"is longer than {max_line_bytes(self.settings)} bytes")
        return parse_line(number, raw, self.endpoint)

    def _check_model(self, model: str) -> None:
        if self.known_models and model not in self.known_models:
            raise BadField("model", "no worker serves this model or has served it", "model_not_found")


def _field_error(error: BadField, number: int) -> dict[str, Any]:
    # `named_job` puts the line's custom_id among the body's fields; the body's own is unknown there.
    own = error.param == "custom_id" and error.code != "unknown_parameter"
    param = "custom_id" if own else f"body.{error.param}" if error.param else "body"
    code = error.code if error.code == "model_not_found" else "invalid_request"
    return line_error(code, f"{param}: {error.message}", number, param)
