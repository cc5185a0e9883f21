"""Compiles `ops.c`, with the headers it includes, once per user and machine, and loads it.

Owns the compiler's command line and the cache of binaries. Knows no operation. The binary is called through
ctypes, which needs no Python headers, only a C compiler. Its parallel loops run on torch's own OpenMP: torch
brings a private libgomp, and a second one would keep a second crowd of spinning threads on the same cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("ops.c")
INCLUDED = tuple(
    SOURCE.with_name(f"{name}.h")
    for name in ("vectors", "attention", "shared", "paged", "matmul", "matmul_i8", "sampling", "blocks")
)
# -O2, because the vectors are explicit: as fast as -O3 here (decode attention 33 ms either way), built in a third
# of the time. No -ffast-math: it would let NaN and the order of sums go.
COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-O2", "-march=native", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
COMPILE_SECONDS = 120


class BuildError(RuntimeError):
    """No binary could be made; the message holds the compiler's own words."""


def load_library() -> ctypes.CDLL:
    """The compiled operations: from the cache, or built now (a few seconds).

    Parallel when torch's OpenMP runtime can be shared, else single-threaded. Raises `BuildError`.
    """
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise BuildError(f"no C compiler found (looked for {', '.join(COMPILERS)})")
    if _share_openmp():
        try:
            return _load(compiler, (*FLAGS, "-fopenmp"))
        except BuildError as error:
            logger.warning("cpu kernels without OpenMP: %s", error)
    return _load(compiler, (*FLAGS, "-Wno-unknown-pragmas"))


def _share_openmp() -> bool:
    """Make torch's libgomp visible to libraries loaded later."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            return True
        except OSError as error:
            logger.warning("%s could not be loaded: %s", path, error)
    return False


def _load(compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    path = cache_folder() / f"kernels-{_key(compiler, flags)}.so"
    if path.exists():
        with contextlib.suppress(OSError):  # a damaged file: build it again
            return ctypes.CDLL(str(path))
    _compile(compiler, flags, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # symbols that this OpenMP runtime lacks
        raise BuildError(f"{path} could not be loaded: {error}") from None


def cache_folder() -> Path:
    """A folder that only this user can write, since what lies in it is executed."""
    home = Path.home() / ".cache" / "nightpress"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if home.stat().st_uid == os.getuid() and os.access(home, os.W_OK):
            return home
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="nightpress-"))


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    """Changes with the sources, the command, the compiler's binary and what the processor can do."""
    stat = Path(compiler).resolve().stat()
    parts = [path.read_bytes() for path in (SOURCE, *INCLUDED)]
    parts.append(repr((compiler, flags, stat.st_size, stat.st_mtime_ns)).encode())
    parts.append(platform.machine().encode())
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        parts.append("\n".join(sorted({line for line in lines if line.startswith(wanted)})).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    # Built under a name of its own, then renamed: processes that build at once each end with a whole file.
    # Compiled with -fopenmp but linked without it, so that no second libgomp is pulled in.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        code, binary = f"{folder}/ops.o", f"{folder}/ops.so"
        _call([compiler, *flags, "-c", str(SOURCE), "-o", code])
        _call([compiler, "-shared", code, "-lm", "-o", binary])
        os.replace(binary, path)


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
