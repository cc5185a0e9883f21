"""Client: this service's HTTP API as the command line speaks it, with the standard library only.

Owns requests, and the two ways in which they fail: a server that is not there, and a server that says no.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

TIMEOUT_SECONDS = 60.0


class ClientError(Exception):
    """The request did not succeed; the message says why."""


class Unreachable(ClientError):
    """Nobody answers under the address, or the answer broke off."""


class Refused(ClientError):
    """The server's own words. `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Raises `ClientError`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # Proxies of the environment are for the outside world; this service is ours.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, *path: str) -> dict[str, Any]:
        return self._json("GET", path)

    def post(self, *path: str, body: object = None) -> dict[str, Any]:
        return self._json("POST", path, body)

    @contextmanager
    def lines(self, *path: str) -> Iterator[tuple[bool, Iterable[bytes]]]:
        """Whether the answer says that more will follow later, and its lines as they arrive."""
        with self._answer("GET", path) as answer:
            yield answer.headers.get("X-Incomplete") == "true", answer

    def _json(self, method: str, path: tuple[str, ...], body: object = None) -> dict[str, Any]:
        with self._answer(method, path, body) as answer:
            try:
                data = json.loads(answer.read())
            except ValueError:
                raise Unreachable(f"{self.url} does not answer like Nightpress") from None
        if not isinstance(data, dict):
            raise Unreachable(f"{self.url} does not answer like Nightpress")
        return data

    @contextmanager
    def _answer(self, method: str, path: tuple[str, ...], body: object = None) -> Iterator[Any]:
        url = "/".join((self.url, *(urllib.parse.quote(part, safe="") for part in path)))
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            raise Refused(error.code, _message(error)) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise Unreachable(f"{self.url} cannot be reached: {reason}") from None


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return f"HTTP {error.code} {error.reason}"
