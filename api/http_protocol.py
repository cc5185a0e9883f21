"""HttpProtocol: HTTP/1.1 as uvicorn parses it in C, with its refusals in OpenAI's envelope.

Owns the answer to bytes that are no request, a method that nobody has among them: the application never sees those,
and uvicorn itself would say so in plain text. Knows no route. Such an answer has a request id, though nothing is in
the log under it: what was sent is not to be written there.
"""

from __future__ import annotations

import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.errors import error_body, new_request_id


class HttpProtocol(HttpToolsProtocol):
    def send_400_response(self, msg: str) -> None:
        """Answers and closes, as uvicorn's own does."""
        body = json.dumps(error_body(400, msg, code="invalid_http_request")).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            f"x-request-id: {new_request_id()}\r\n"
            "x-should-retry: false\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()
