"""Loaded by every Python process that has this folder on its path. In an engine process it writes down how many
tokens each step made, canaries aside, and dies of a poisoned request: one whose seed is POISON.

`TAP_FILE`: one STEP record per step, the monotonic time in seconds and the tokens. `TAP_DEATH`: `exit`, `kill`
(SIGKILL), or nothing. Once there is a file `TAP_FILE`.broken, the device is: every step of every process ends it, or
hangs if the file says so.
"""

import os
import signal
import struct
import sys
import threading
import time
from pathlib import Path

POISON = 666

# a power of two long, so that none lies across two pages of the file: there a SIGKILL cuts a write in two
STEP = struct.Struct("=dq")

if "engine.process" in sys.orig_argv and "TAP_FILE" in os.environ:
    from engine.engine import Engine
    from jobs.canary import CANARY

    _step = Engine.step
    _file = os.open(os.environ["TAP_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    _death = os.environ.get("TAP_DEATH")
    _broken = Path(os.environ["TAP_FILE"] + ".broken")

    def _tapped(engine):  # type: ignore[no-untyped-def]
        if _broken.exists():
            if _broken.read_text() == "hangs":
                threading.Event().wait()
            os._exit(7)
        running = engine.scheduler.running
        if _death and any(sequence.request.sampling.seed == POISON for sequence in running):
            if _death == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(7)
        if CANARY in engine:
            return _step(engine)
        before = engine.stats()["num_generated_tokens"]
        completions = _step(engine)
        made = engine.stats()["num_generated_tokens"] - before
        os.write(_file, STEP.pack(time.monotonic(), made))
        return completions

    Engine.step = _tapped  # type: ignore[method-assign]
