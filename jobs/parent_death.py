"""ParentDeath: a child process that does not outlive the process that made it.

Owns the step between fork and exec that asks the kernel for it (PR_SET_PDEATHSIG, prctl(2); Linux only). To the
kernel the parent is the thread that made the child: make it in the main thread, or in one that lives as long.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
# Loaded here, because a child may do little between fork and exec.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def tied_to_parent(number: signal.Signals) -> Callable[[], None]:
    """For `preexec_fn` of `subprocess.Popen`: the child gets this signal when its parent dies, and ends at once when
    that has happened already."""
    parent = os.getpid()

    def tie() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)

    return tie
