"""LineChecker: two processes find in a file what one finds, also when one of them dies."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import batch_check, line_check
from jobs.drafts import DraftFile
from jobs.line_check import BLOCK_BYTES, Block, Found
from jobs.line_checker import LineChecker
from tests.jobs.test_batch_check import HOSTILE, check, raw
from tests.support.batch_lines import chat_line, jsonl

HARD = {
    "good": jsonl([chat_line(i) for i in range(300)]),
    "bad lines": b"\n".join(line for line, _, _ in HOSTILE.values()),
    "long lines": b"".join(raw(i, body={"user": "x" * (4_000 * i)}) + b"\n" for i in range(12)),
    "a last line that is too long": jsonl([chat_line(i) for i in range(9)]) + b"x" * 100_000,
    "too many": jsonl([chat_line(i) for i in range(310)]),
    "twice": jsonl([chat_line(i % 290) for i in range(300)]),
    "two models": jsonl([chat_line(i, model="other" if i == 99 else "tiny") for i in range(100)]),
}


class Prompt(LineChecker):
    """Used from the first block on."""

    def offer(self, block: Block) -> bool:
        while self.alive and not self._ready:
            self._wait()
        return super().offer(block)


@pytest.fixture(autouse=True)
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_check, "BLOCK_BYTES", 1_000)
    monkeypatch.setattr(batch_check, "LineChecker", Prompt)


@pytest.mark.parametrize("name", HARD)
def test_neither_blocks_nor_a_second_process_change_anything(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_two, in_blocks = check(HARD[name], in_two=True), check(HARD[name])
    monkeypatch.setattr(line_check, "BLOCK_BYTES", BLOCK_BYTES)
    whole = check(HARD[name])
    assert in_two == in_blocks == whole


def test_the_death_of_the_second_process_is_not_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies with blocks in its hands; they are checked here."""
    taken: list[LineChecker] = []

    class Mortal(Prompt):
        def take(self, block: Block, *, wait: bool) -> Found | None:
            found = super().take(block, wait=wait)
            if found is not None and not taken:
                taken.append(self)
                self._process.kill()
                self._process.wait()
            return found

    monkeypatch.setattr(batch_check, "_MAX_BLOCKS", 1)
    monkeypatch.setattr(batch_check, "LineChecker", Mortal)
    content = jsonl([chat_line(i) for i in range(300)])
    assert check(content, in_two=True) == check(content)
    assert taken
    assert not taken[0].alive


def test_their_drafts_are_the_same(tmp_path: Path) -> None:
    content = jsonl([chat_line(i) for i in range(200)])
    with DraftFile(str(tmp_path)) as one, DraftFile(str(tmp_path)) as other:
        check(content, drafts=one)
        check(content, drafts=other, in_two=True)
        assert one.whole
        assert other.whole
        assert list(one) == list(other)
