"""What the check of a file found out comes back as it was, or not at all, and jobs made of it are the same jobs."""

from __future__ import annotations

from itertools import accumulate, chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import batch_intake
from jobs.body import JobBody, parse_job
from jobs.database import Database
from jobs.drafts import MEMORY_BYTES, Draft, DraftFile, by_column, draft_of, joined
from jobs.json_text import JsonText
from jobs.settings import Settings
from tests.support.batch_lines import CHAT, Bench, chat_line, insert_one_chunk, jsonl

BODIES = [
    {"prompt": "a", "seed": 2**63 - 1, "metadata": {"k": "é 😀 \x00"}, "custom_id": "ä"},
    {"prompt": "b", "seed": -(2**63)},
    {"messages": [{"role": "user", "content": "NUL \x00"}], "logit_bias": {"7": 0.5}, "stop": ["\n"]},
]
# columns that a job's place in the queue and the time of its insert decide
MOMENTARY = {"id", "batch_id", "created_at", "fair_tag", "deadline"}


def test_what_goes_in_comes_out(tmp_path: Path, settings: Settings) -> None:
    drafts = [draft_of(parse_job(body | {"model": "tiny"}, settings), settings) for body in BODIES]
    drafts.append(draft_of(JobBody(model="tiny", prompt="x" * 2 * MEMORY_BYTES), settings))
    with DraftFile(str(tmp_path)) as file:
        for part in (slice(0, 2), slice(2, None)):
            file.add(by_column(list(enumerate(drafts))[part]).packed())
        assert not file.whole
        file.finish()
        assert file.whole
        found = joined(list(file))
    assert list(zip(*found, strict=True)) == [(end, *draft) for end, draft in enumerate(drafts)]
    assert all(type(body) is JsonText for body in found.bodies)
    assert list(zip(*found.part(1, 3), strict=True)) == [(1, *drafts[1]), (2, *drafts[2])]
    assert list(tmp_path.iterdir()) == []


@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=9), max_size=6),
    st.integers(1, 40),
    st.integers(0, 50),
)
def test_a_chunk_has_as_many_as_it_may_and_no_more(sizes: list[list[int]], left: int, begin: int) -> None:
    """sizes: bytes of the lines of each block."""
    ends = accumulate(chain.from_iterable(sizes), initial=begin)
    next(ends)
    blocks = [[next(ends) for _ in block] for block in sizes]
    draft = Draft(None, "tiny", JsonText("{}"), {}, None, 1, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_intake, "CHUNK", 5)
        patch.setattr(batch_intake, "CHUNK_BYTES", 100)
        drafts = (by_column([(end, draft) for end in block]) for block in blocks)
        chunks = [list(chunk.ends) for chunk in batch_intake._cut(drafts, begin, left)]
    given_ends = list(chain.from_iterable(blocks))[:left]
    made = list(chain.from_iterable(chunks))
    assert made == given_ends[: len(made)]
    for chunk in chunks:
        *before, last = [begin, *chunk]
        full = len(chunk) == 5 or last - begin >= 100
        assert len(chunk) <= 5
        assert before[-1] - begin < 100  # the line that passes the limit is the last
        assert full or last == given_ends[-1]
        begin = last
    # what is left of a file that is shorter than it was is not inserted
    rest = given_ends[len(made) :]
    assert len(given_ends) < left or not rest
    assert len(rest) < 5


def test_a_disk_that_is_full_costs_time_and_nothing_else(settings: Settings) -> None:
    draft = draft_of(JobBody(model="tiny", prompt="x" * 2 * MEMORY_BYTES), settings)
    with DraftFile("/nowhere/at/all") as file:  # what does not fit in memory finds no place
        for end in range(3):
            file.add(by_column([(end, draft)]).packed())
        file.finish()
        assert not file.whole


def test_jobs_are_the_same_whether_their_lines_are_read_once_or_twice(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_intake, "CHUNK", 3)
    bench = Bench(database, settings)
    lines = [chat_line(i, metadata={"n": str(i)}) for i in range(7)]
    lines[3]["body"].pop("seed")
    content = b"\n" + jsonl(lines[:4]) + b"\r\n \n" + jsonl(lines[4:]).removesuffix(b"\n")
    once = bench.create(content)
    bench.work()
    twice = bench.create(content)
    insert_one_chunk(bench, twice)
    bench.work()
    jobs, others = bench.jobs(once), bench.jobs(twice)
    assert [job.custom_id for job in jobs] == [line["custom_id"] for line in lines]
    for number, (job, other) in enumerate(zip(jobs, others, strict=True)):
        differing = {name for name, value in job._mapping.items() if value != other._mapping[name]}
        assert differing <= MOMENTARY | ({"seed"} if number == 3 else set())
    assert bench.batch(once).endpoint == CHAT
    assert bench.batch(once).next_offset is None
