"""Chunks: OpenAI's streamed answers, as server-sent events (WHATWG HTML, 9.2).

Owns the objects `chat.completion.chunk` and `text_completion` of a stream, their order, and the bytes around them: a
role first, then pieces of reasoning and of text, then why each choice ended, perhaps the usage, then `[DONE]`; an
error instead of the rest when something goes wrong on the way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from jobs.openai_body import CHAT, Url

JSON = dict[str, Any]
DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"  # a comment: proxies see that the line lives
HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
MEDIA_TYPE: Final = "text/event-stream"


def event(data: JSON) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """The chunks of one answer. `created` in unix seconds."""

    url: Url
    answer_id: str
    created: int
    model: str
    include_usage: bool

    def opening(self, num_choices: int) -> bytes:
        """A chat's roles; text completions have none."""
        if self.url != CHAT:
            return b""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk(self._choice(index, delta)) for index in range(num_choices))

    def text(self, index: int, text: str) -> bytes:
        return self._chunk(self._choice(index, {"content": text} if self.url == CHAT else text))

    def reasoning(self, index: int, text: str) -> bytes:
        """What is thought before the answer; text completions have none."""
        return self._chunk(self._choice(index, {"reasoning_content": text}))

    def end(self, output: JSON) -> bytes:
        """Why a choice ended; `output` as `jobs.outcomes` stores it."""
        reasons = {name: output[name] for name in ("finish_reason", "stop_reason")}
        return self._chunk(self._choice(output["index"], {} if self.url == CHAT else "") | reasons)

    def closing(self, usage: JSON) -> bytes:
        return (event(self._object([]) | {"usage": usage}) if self.include_usage else b"") + DONE

    def _choice(self, index: int, said: JSON | str) -> JSON:
        return {
            "index": index,
            "delta" if self.url == CHAT else "text": said,
            "logprobs": None,
            "finish_reason": None,
        }

    def _chunk(self, choice: JSON) -> bytes:
        return event(self._object([choice]) | ({"usage": None} if self.include_usage else {}))

    def _object(self, choices: list[JSON]) -> JSON:
        return {
            "id": self.answer_id,
            "object": "chat.completion.chunk" if self.url == CHAT else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
