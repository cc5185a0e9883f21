"""A file of a million lines: checked, and its jobs made, in a memory that does not notice."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from jobs.batch_check import check_file
from jobs.batch_intake import CHUNK
from jobs.clerk import Clerk
from jobs.database import Database
from jobs.settings import Settings
from tests.support.batch_lines import CHAT, Bench, chat_line, jsonl

MAX_GROWTH = 100_000_000  # bytes, whatever the number of lines
NUM_INSERTED = 60_000  # making jobs takes the same memory for each chunk; so many show it


class Growth:
    """Resident memory of this process beyond what it was, the highest of all looks."""

    def __init__(self, *, every: int) -> None:
        self._every = every
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._ticks = 0
        self.most = 0

    def look(self) -> None:
        self._ticks += 1
        if self._ticks % self._every == 0:
            self.most = max(self.most, self._process.memory_info().rss - self._before)


def write(path: Path, count: int) -> None:
    sample = jsonl([chat_line(0)]).decode()
    with path.open("w") as file:
        for i in range(count):
            file.write(sample.replace("line-0", f"line-{i}"))


@pytest.mark.long
def test_the_check_of_a_million_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    write(path, 1_000_000)
    growth = Growth(every=5_000)
    with path.open("rb") as file:
        findings = check_file(
            file, CHAT, Settings(model="tiny"), known_models=frozenset({"tiny"}), tick=growth.look
        )
    path.unlink()
    assert (findings.errors, findings.load.jobs) == ([], 1_000_000)
    assert growth.most < MAX_GROWTH, f"{growth.most / 1e6:.0f} MB"


@pytest.mark.long
def test_the_last_line_repeats_the_first(tmp_path: Path) -> None:
    """Both are found, however far they are apart."""
    path = tmp_path / "in.jsonl"
    write(path, 100_000)
    with path.open("ab") as file:
        file.write(jsonl([chat_line(0)]))
    with path.open("rb") as file:
        (error,) = check_file(file, CHAT, Settings(), known_models=frozenset(), tick=lambda: None).errors
    assert (error["line"], error["code"]) == (100_001, "duplicate_custom_id")
    assert "line 1" in error["message"]


@pytest.mark.long
def test_jobs_are_made_chunk_by_chunk(database: Database, settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    write(path, NUM_INSERTED)
    bench = Bench(database, settings)
    batch_id = bench.create(path.read_bytes())
    path.unlink()
    growth = Growth(every=1)
    ends: list[int] = []

    def announce(model: str) -> None:
        ends.append(bench.batch(batch_id).num_inserted)
        growth.look()

    assert Clerk(database, settings, announce).work_once()
    assert ends[-1] == NUM_INSERTED == bench.batch(batch_id).num_inserted
    assert max(end - begin for begin, end in pairwise([0, *ends])) == CHUNK
    assert growth.most < MAX_GROWTH, f"{growth.most / 1e6:.0f} MB"
