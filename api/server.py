"""The api process: uvicorn around the application, with a sweeper, a timekeeper, clerks and wake-ups beside it.

Owns the socket, the start-up order and the clean stop. The socket is bound here, before anything else starts,
so that a port that is taken is a plain message, and port 0 can be told to whoever asked for it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError

from api.app import create_app
from api.http_protocol import HttpProtocol
from api.loopback import address_of, is_loopback
from api.waits import Waits
from jobs.broker import make_app
from jobs.clerk import Clerks
from jobs.database import Database, reason_of
from jobs.intake import Intake
from jobs.keys import Keys
from jobs.settings import REQUEST_GRACE_SECONDS, Settings
from jobs.sweeper import Sweeper
from jobs.timekeeper import Timekeeper
from jobs.wakeups import WakeUps
from migrations.schema import misfit

log = logging.getLogger(__name__)

FAREWELL_SECONDS = 2  # before a stop's grace is over: who still waits for a job is told, and can be answered


def run(settings: Settings, url_file: Path | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status. Prints `listening on URL` once it answers.

    Binds an address that other machines reach only when there is an API key.
    """
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    database = Database(settings.database)
    try:
        if (why := misfit(database)) is not None:
            return _refuse(why)
        if not is_loopback(settings.host) and not Keys(database).any():
            return _refuse(
                f"refusing to bind {settings.host}: there is no API key yet, so whoever reaches it could submit "
                "and read everything. Make one with `nightpress keys create NAME`, or bind a loopback address."
            )
        listener = _bind(settings.host, settings.port)
    except SQLAlchemyError as error:
        return _refuse(f"the database cannot be reached: {reason_of(error)}")
    except OSError as error:
        return _refuse(f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}")
    wakeups = WakeUps(make_app(settings), database)
    sweeper = Sweeper(database, settings.sweep_seconds, wakeups.wake)
    timekeeper = Timekeeper(database, Intake(database, settings), settings.sweep_seconds, wakeups.wake)
    sweeper.start()
    timekeeper.start()
    clerks = Clerks(database, settings, wakeups.wake)
    clerks.start()
    try:
        app = create_app(settings, database, wakeups.wake, clerks.notice)
        _Server(app, settings, listener, url_file).serve_all()
    finally:
        timekeeper.stop()
        clerks.stop()
        sweeper.stop()
        wakeups.close()
        database.close()
        if url_file is not None:
            url_file.unlink(missing_ok=True)
    return 0


class _Server(uvicorn.Server):
    def __init__(
        self, app: FastAPI, settings: Settings, listener: socket.socket, url_file: Path | None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpProtocol,
                log_level=settings.log_level,
                log_config=None,
                access_log=False,  # addresses hold ids and filters, and there is a request id for errors
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=REQUEST_GRACE_SECONDS,
            )
        )
        self._waits: Waits = app.state.waits
        self._listener = listener
        self._url_file = url_file

    def serve_all(self) -> None:
        # uvicorn raises the signal once more after its clean stop; for us the stop is the whole answer.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self.run(sockets=[self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self._listener.getsockname()[:2]
        url = address_of(host, port)
        if self._url_file is not None:
            write_whole(self._url_file, url + "\n")
        sys.stdout.write(f"listening on {url}\n")
        sys.stdout.flush()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        seconds = REQUEST_GRACE_SECONDS - FAREWELL_SECONDS
        farewell = asyncio.get_running_loop().call_later(seconds, self._waits.dismiss)
        await super().shutdown(sockets)
        farewell.cancel()


def write_whole(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.replace(path)


def _bind(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _refuse(reason: str) -> int:
    sys.stderr.write(f"nightpress: {reason}\n")
    return 1
