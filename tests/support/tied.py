"""Runs a program whose life is tied to the process that started it, optionally as another user.

`python tied.py PARENT_PID SIGNAL_NUMBER UID PROGRAM ARG…`. A test run that is killed can clean up nothing, so
the kernel does it: PR_SET_PDEATHSIG (prctl(2)) delivers the signal when the starting *thread* ends, therefore
start such programs from the main thread. Run as a script, so it imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent, signal_number, uid = (int(argument) for argument in arguments[:3])
    command = arguments[3:]
    if uid != os.getuid():
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)  # before prctl: a change of credentials clears the setting
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal_number) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit("the starting process is gone")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
