"""HttpProtocol: HTTP/1.1 as uvicorn parses it in C, with its refusals in OpenAI's envelope.

Owns the answer to bytes that are no request, a method that nobody has among them: the application never sees those,
and uvicorn itself would say so in plain text. And how much may come before a request's headers are complete, which
nobody else would bound, since keys are asked for after it. Knows no route. Such an answer has a request id, though
nothing is in the log under it: what was sent is not to be written there.
"""

from __future__ import annotations

import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.errors import new_request_id
from jobs.openai_answers import error_object

MAX_HEAD_BYTES = 64 * 1024  # of a request's line and headers, give or take what comes in one piece


class HttpProtocol(HttpToolsProtocol):
    _head_bytes = 0  # of a request whose headers are not complete
    _in_head = False

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            message = (
                f"the request line and headers are too large: at most {MAX_HEAD_BYTES} bytes are allowed"
            )
            self._refuse(
                "431 Request Header Fields Too Large", error_object(431, message, code="headers_too_large")
            )

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers and closes, as uvicorn's own does."""
        self._refuse("400 Bad Request", error_object(400, msg, code="invalid_http_request"))

    def _refuse(self, status: str, error: dict[str, Any]) -> None:
        body = json.dumps(error).encode()
        head = (
            f"HTTP/1.1 {status}\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            f"x-request-id: {new_request_id()}\r\n"
            "x-should-retry: false\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()
