"""Workload: the requests that ours and every peer get, as a file of token ids.

Owns the four workloads, their seeds and the file's format. Knows no engine and no clock. All are greedy and ignore
the end of sequence, so a request is a prompt and the number of tokens to follow it.

The file is JSON: `name`, `seed`, `vocab_size`, and two lists of `{"prompt_token_ids", "max_tokens"}`: `requests`,
which are measured, and `warm_up`, which is run before and shares no prompt with them.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

FIRST_ID: Final = 20  # SmolLM2's control tokens are below
WARM_UP: Final = 8  # requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`max_tokens` tokens are to follow the prompt, whatever they are."""

    prompt_token_ids: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    name: str
    seed: int
    vocab_size: int
    requests: list[Job]
    warm_up: list[Job]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(job.prompt_token_ids) for job in self.requests)

    @property
    def num_new_tokens(self) -> int:
        return sum(job.max_tokens for job in self.requests)

    def part(self, count: int | None) -> Workload:
        """The first `count` requests, and no more for the warm-up; None: all."""
        if count is None:
            return self
        return replace(self, requests=self.requests[:count], warm_up=self.warm_up[:count])

    def write(self, path: Path) -> None:
        """All of it or nothing: a reader never meets half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}.new")
        new.write_text(json.dumps(asdict(self)) + "\n")
        new.replace(path)


def read(path: Path) -> Workload:
    found = json.loads(path.read_text())
    found |= {name: [Job(**job) for job in found[name]] for name in ("requests", "warm_up")}
    return Workload(**found)


class _Draw:
    """Draws of one seed."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._rng, self._vocab_size = random.Random(seed), vocab_size

    def ids(self, count: int) -> list[int]:
        return [self._rng.randrange(FIRST_ID, self._vocab_size) for _ in range(count)]

    def between(self, least: int, most: int) -> int:
        return self._rng.randint(least, most)


def _mixed(draw: _Draw) -> dict[str, Any]:
    def jobs(count: int, most: int) -> list[Job]:
        return [
            Job(prompt_token_ids=draw.ids(draw.between(16, 256)), max_tokens=draw.between(16, most))
            for _ in range(count)
        ]

    return {"requests": jobs(96, 256), "warm_up": jobs(WARM_UP, 32)}


def _shared(draw: _Draw) -> dict[str, Any]:
    def jobs(count: int, least: int, most: int) -> list[Job]:
        prefix = draw.ids(512)
        return [
            Job(
                prompt_token_ids=prefix + draw.ids(draw.between(16, 64)), max_tokens=draw.between(least, most)
            )
            for _ in range(count)
        ]

    return {"requests": jobs(96, 32, 128), "warm_up": jobs(WARM_UP, 8, 16)}


def _long(draw: _Draw) -> dict[str, Any]:
    jobs = [Job(prompt_token_ids=draw.ids(4000), max_tokens=128) for _ in range(8)]
    return {"requests": jobs, "warm_up": [Job(prompt_token_ids=draw.ids(4000), max_tokens=8)]}


def _single(draw: _Draw) -> dict[str, Any]:
    job, warm_up = (Job(prompt_token_ids=draw.ids(64), max_tokens=count) for count in (256, 32))
    return {"requests": [job], "warm_up": [warm_up]}


# In the order in which they run; each with its seed.
WORKLOADS: Final[dict[str, tuple[int, Callable[[_Draw], dict[str, Any]]]]] = {
    "mixed": (611, _mixed),
    "shared": (612, _shared),
    "long": (613, _long),
    "single": (614, _single),
}


def drawn(name: str, vocab_size: int) -> Workload:
    """The same workload whenever it is drawn."""
    seed, make = WORKLOADS[name]
    return Workload(name=name, seed=seed, vocab_size=vocab_size, **make(_Draw(seed, vocab_size)))


def kept(name: str, vocab_size: int, folder: Path) -> Workload:
    """The file `<name>.json` of the folder, which is drawn and written where it is missing."""
    path = folder / f"{name}.json"
    if not path.exists():
        drawn(name, vocab_size).write(path)
    return read(path)
