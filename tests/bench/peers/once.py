"""Once: what is made on the first use and kept in the cache folder: virtual environments, copies of the weights.

Owns where the cache is, how something half made is never taken for whole, and how a command that fails is told. Knows
not what is made.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

WHOLE: Final = ".whole"  # written last


class Unavailable(Exception):
    """Something cannot be had here. Its text is the reason, on one line."""


def cache_folder() -> Path:
    """`NIGHTPRESS_PEERS_DIR`, or a folder of the user's cache."""
    named = os.environ.get("NIGHTPRESS_PEERS_DIR")
    return Path(named).resolve() if named else Path.home() / ".cache" / "nightpress" / "peers"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made by `make` where it is missing or half made. It is made in its place, because a virtual
    environment cannot be moved. Raises what `make` raises."""
    if not (folder / WHOLE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        make(folder)
        (folder / WHOLE).touch()
    return folder


def ran(
    command: Sequence[str], *, cwd: Path, timeout: float, environment: Mapping[str, str] | None = None
) -> str:
    """What the command printed. It is a session of its own, of which nothing is left when this returns. Raises
    `Unavailable` with its last words when it fails or takes longer than `timeout` seconds."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=out, stderr=err, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    if status is None:
        raise Unavailable(f"not done after {timeout:g} s")
    if status:
        ended = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        raise Unavailable(f"{ended}: {last_words(texts[1] + texts[0])}")
    return texts[0]


def last_words(text: str) -> str:
    """The last line that looks like an error, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "ERROR:" in line or "Exception" in line]
    return (errors or lines or ["it said nothing"])[-1][:300]
