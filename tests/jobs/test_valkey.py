"""PrivateValkey: a real server that keeps its data and dies with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from jobs.valkey import PrivateValkey
from tests.support.waiting import wait_until


def test_data_survives_a_restart(tmp_path: Path) -> None:
    socket = tmp_path / "v.sock"
    for expected in (None, b"1"):
        server = PrivateValkey(socket)
        server.start()
        with redis.Redis(unix_socket_path=str(socket)) as client:
            assert client.get("k") == expected
            client.set("k", "1")
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        server.stop()
        assert not server.alive


def test_a_second_server_in_one_folder_is_refused(tmp_path: Path) -> None:
    server = PrivateValkey(tmp_path / "v.sock")
    server.start()
    with pytest.raises(RuntimeError, match="already runs"):
        PrivateValkey(tmp_path / "v.sock").start()
    server.stop()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="too deep"):
        PrivateValkey(tmp_path / ("x" * 100) / "v.sock").start()


def test_it_dies_with_a_killed_parent(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, signal\n"
        "from jobs.valkey import PrivateValkey\n"
        "server = PrivateValkey(pathlib.Path(sys.argv[1])); server.start()\n"
        "print(server._process.pid, flush=True); signal.pause()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "v.sock")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not _running(pid), "the server's end")


def _running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


assert os.name == "posix"
