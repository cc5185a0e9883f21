"""OpenAI's answers of chat and text completions, made of a job's outputs, for HTTP and for batch files alike.

Owns the objects `chat.completion`, `text_completion` and their usage, as plain JSON. Outputs are as `jobs.outcomes`
stores them: index, text, finish_reason, stop_reason, reasoning and reasoning_tokens where the model reasoned, and
logprobs where they were asked for, in a chat's shape. OpenAI shows no reasoning in a chat; `reasoning_content` is the
name that DeepSeek, SGLang and vLLM gave it.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Final

from jobs.openai_body import CHAT, COMPLETIONS, Url

JSON = dict[str, Any]
_PREFIX: Final = {CHAT: "chatcmpl-", COMPLETIONS: "cmpl-"}


def usage_object(prompt: int, completion: int, cached: int, outputs: Sequence[JSON] | None) -> JSON:
    """Tokens; `cached` are those of `prompt` that needed no computing."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning_in(outputs)},
    }


def reasoning_in(outputs: Sequence[JSON] | None) -> int:
    """Tokens of reasoning in all samples, which count as completion."""
    return sum(output.get("reasoning_tokens", 0) for output in outputs or ())


def answer_id(url: Url, name: str) -> str:
    """`name`: an id of ours without its prefix."""
    return _PREFIX[url] + name


def completion_object(
    url: Url,
    outputs: Sequence[JSON],
    *,
    answer_id: str,
    created: int,
    model: str,
    usage: JSON,
) -> JSON:
    """`created` in unix seconds."""
    chat = url == CHAT
    choices = []
    for output in outputs:
        text, logprobs = output["text"], output.get("logprobs")
        choices.append(
            {
                "index": output["index"],
                **({"message": _message(output)} if chat else {"text": text}),
                "logprobs": logprobs if chat or logprobs is None else numbered_logprobs(logprobs),
                "finish_reason": output["finish_reason"],
                "stop_reason": output["stop_reason"],
            }
        )
    return {
        "id": answer_id,
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage,
    }


def _message(output: JSON) -> JSON:
    message = {"role": "assistant", "content": output["text"], "refusal": None}
    return message | ({"reasoning_content": output["reasoning"]} if "reasoning" in output else {})


def numbered_logprobs(logprobs: JSON) -> JSON:
    """A chat's logprobs as text completions have them; `text_offset` counts characters. As at OpenAI the likeliest
    tokens include the one that was taken, and a token that is no whole text is spelled in bytes."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    place = 0
    for entry in logprobs["content"]:
        made["tokens"].append(_spelled(entry))
        made["token_logprobs"].append(entry["logprob"])
        made["top_logprobs"].append(
            {_spelled(one): one["logprob"] for one in [*entry["top_logprobs"], entry]}
        )
        made["text_offset"].append(place)
        place += len(utf8.decode(bytes(entry["bytes"] or ())))
    return made


def _spelled(entry: JSON) -> str:
    raw = bytes(entry["bytes"] or ())
    try:
        raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return str(entry["token"])


def error_object(status: int, message: str, *, code: str, param: str | None = None) -> JSON:
    """The body of an answer with that HTTP status."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
