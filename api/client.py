"""Client: this service's HTTP API as the command line speaks it, with the standard library only.

Owns requests, and the two ways in which they fail: a server that is not there, and a server that says no.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

TIMEOUT_SECONDS = 60.0
Query = Sequence[tuple[str, str]]


class ClientError(Exception):
    """The request did not succeed; the message says why."""


class Unreachable(ClientError):
    """Nobody answers under the address, or the answer broke off."""


class Refused(ClientError):
    """The server's own words. `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Lines:
    """An answer of JSON lines. `incomplete`: more will follow, behind the cursor `next` or later."""

    incomplete: bool
    next: str | None
    lines: Iterable[bytes]


class Client:
    """Raises `ClientError`. `api_key` is sent with every request, and never where a redirect points."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._api_key = api_key
        # Proxies of the environment are for the outside world; this service is ours.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, *path: str, query: Query = ()) -> dict[str, Any]:
        return self._json("GET", path, query=query)

    def patch(self, *path: str, body: object) -> dict[str, Any]:
        return self._json("PATCH", path, body)

    def delete(self, *path: str) -> dict[str, Any]:
        return self._json("DELETE", path)

    def post(self, *path: str, body: object = None, idempotency_key: str | None = None) -> dict[str, Any]:
        return self._json("POST", path, body, idempotency_key)

    @contextmanager
    def lines(self, *path: str, query: Query = ()) -> Iterator[Lines]:
        with self._answer("GET", path, query=query) as answer:
            yield Lines(
                incomplete=answer.headers.get("X-Incomplete") == "true",
                next=answer.headers.get("X-Next"),
                lines=answer,
            )

    def _json(
        self,
        method: str,
        path: tuple[str, ...],
        body: object = None,
        idempotency_key: str | None = None,
        query: Query = (),
    ) -> dict[str, Any]:
        with self._answer(method, path, body, idempotency_key, query) as answer:
            try:
                data = json.loads(answer.read())
            except ValueError:
                raise Unreachable(f"{self.url} does not answer like Nightpress") from None
        if not isinstance(data, dict):
            raise Unreachable(f"{self.url} does not answer like Nightpress")
        return data

    @contextmanager
    def _answer(
        self,
        method: str,
        path: tuple[str, ...],
        body: object = None,
        idempotency_key: str | None = None,
        query: Query = (),
    ) -> Iterator[Any]:
        url = "/".join((self.url, *(urllib.parse.quote(part, safe="") for part in path)))
        if query:
            url += "?" + urllib.parse.urlencode(query)
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        request = urllib.request.Request(url, data, headers, method=method)
        if self._api_key:
            request.add_unredirected_header("Authorization", f"Bearer {self._api_key}")
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
