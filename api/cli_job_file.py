"""A file of jobs, as `submit` and `schedule create` take it, and what is wrong with one that is none.

Owns its spellings: one job, `{"jobs": […]}`, an array, or a job per line; and where it is cut, when it holds more
than one batch takes. Refuses to know what a job may say: that is the API's to judge.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from json import JSONDecodeError
from typing import IO, Any

import click

JOBS_PER_BATCH = 10_000  # what POST /v1/jobs takes at once
BYTES_PER_BATCH = 32_000_000  # of lines, well below the limit of an array's body


def bodies_of(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Bodies of POST /v1/jobs: one for JSON, as many as are needed for lines. Raises `click.UsageError`."""
    text = file.read()
    name = getattr(file, "name", "<stdin>")
    if not text.strip():
        raise click.UsageError(f"{name}: holds no job")
    try:
        data = _parsed(text)
    except UnicodeDecodeError as error:
        number = 1 + text.count(b"\n", 0, error.start)
        raise click.UsageError(f"{name} line {number}: is not UTF-8") from None
    except JSONDecodeError as error:
        yield from _batches(name, text, error)
        return
    if not isinstance(data, dict | list):
        raise click.UsageError(f"{name}: must hold a job, an array of jobs, or one job per line")
    _refuse_openai_lines(name, data if isinstance(data, list) else [data])
    yield {"jobs": data} if isinstance(data, list) else data


def _parsed(text: bytes) -> Any:
    return json.loads(text.decode("utf-8-sig"))


def _batches(name: str, text: bytes, whole: JSONDecodeError) -> Iterator[dict[str, Any]]:
    """Of lines. `whole`: why the file is not one JSON value."""
    jobs: list[Any] = []
    lines = [(number, line) for number, line in enumerate(text.split(b"\n"), 1) if line.strip()]
    for number, line in lines:  # all of them, before the first is sent
        try:
            jobs.append(_parsed(line))
        except JSONDecodeError as error:
            # A file whose first line says nothing by itself was meant as one value.
            at, error = (number, error) if jobs else (whole.lineno, whole)
            where = f"{name} line {at}, column {error.colno}"
            raise click.UsageError(f"{where}: not JSON: {error.msg}") from None
    _refuse_openai_lines(name, jobs)
    start = size = 0
    for index, (_, line) in enumerate(lines):
        if index > start and (index - start == JOBS_PER_BATCH or size + len(line) > BYTES_PER_BATCH):
            yield {"jobs": jobs[start:index]}
            start, size = index, 0
        size += len(line)
    yield {"jobs": jobs[start:]}


def _refuse_openai_lines(name: str, jobs: list[Any]) -> None:
    """The likeliest mistake of those who come from OpenAI's batches."""
    if jobs and isinstance(jobs[0], dict) and {"method", "url", "body"} <= jobs[0].keys():
        raise click.UsageError(
            f"{name}: holds lines of an OpenAI batch, not jobs: upload it to POST /v1/files and name it in POST "
            "/v1/batches, as OpenAI's SDK does, or run it without a service: `nightpress run-batch`"
        )
