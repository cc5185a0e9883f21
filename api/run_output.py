"""RunOutput: the output file of a run-batch, and what the terminal shows while it grows.

Owns the lines that are appended and their way to the disk, the bar with its rate, and the sum at the end. Refuses to
know engines and what a line says, save for the first failure, which is told again at the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from typing import BinaryIO

from tqdm import tqdm

from jobs.run_files import Done

SYNC_SECONDS = 1.0  # what a power cut may cost
RATE_SECONDS = 10.0  # over which tok/s is taken


class RunOutput:
    """`done`: what the file holds already, of `total` requests. `quiet`: no bar."""

    def __init__(self, file: BinaryIO, done: Done, total: int, *, quiet: bool) -> None:
        self._file = file
        self._done = done
        self._total = total
        self._num_answered = self._num_failed = 0
        self._num_prompt = self._num_generated = 0  # tokens
        self.first_failure = ""
        self._samples: deque[tuple[float, int]] = deque()  # of the rate: when, how many tokens
        self._synced = self._started = time.monotonic()
        self._bar = tqdm(
            total=total, initial=len(done), unit="req", disable=True if quiet else None, dynamic_ncols=True
        )

    def write(self, line: bytes, *, failed: bool = False) -> None:
        """One more request is answered. Raises `OSError`."""
        self._file.write(line)
        if failed and not self._num_failed:
            told = json.loads(line)
            self.first_failure = (told["error"] or told["response"]["body"]["error"])["message"]
        self._num_answered += 1
        self._num_failed += failed
        self._bar.update()

    def count(self, *, prompt_tokens: int, generated_tokens: int) -> None:
        self._num_prompt += prompt_tokens
        self._num_generated += generated_tokens

    def flush(self) -> None:
        """Out of this process; to the disk now and then. Raises `OSError`."""
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """All that was written is on disk; the file stays open, which is the caller's. Raises `OSError`."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._bar.close()

    def say(self, line: str) -> None:
        """Above the bar, on standard error."""
        self._bar.write(line, file=sys.stderr)

    def show_rate(self, num_partial: int) -> None:
        """`num_partial`: tokens of requests that are not answered yet."""
        now, tokens = time.monotonic(), self._num_generated + num_partial
        self._samples.append((now, tokens))
        while now - self._samples[0][0] > RATE_SECONDS:
            self._samples.popleft()
        since, before = self._samples[0]
        if now - since > 0.5:
            self._bar.set_postfix_str(f"{max(0, tokens - before) / (now - since):.0f} tok/s", refresh=False)

    @property
    def num_failed(self) -> int:
        """In all runs of this file."""
        return self._done.num_failed + self._num_failed

    def summary(self) -> str:
        seconds = time.monotonic() - self._started
        return (
            f"{len(self._done) + self._num_answered} of {self._total} requests answered, {self.num_failed} failed; "
            f"this run: {self._num_prompt} tokens in, {self._num_generated} out in {seconds:.1f} s, "
            f"{self._num_generated / seconds:.0f} tok/s"
        )
