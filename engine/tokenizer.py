"""Tokenizer: text to token ids and back, for one checkpoint, without torch.

Owns the rule that text from a client is text: control tokens spelled in a prompt or a message are encoded as
ordinary characters, and only the checkpoint's own post-processor and chat template write real ones. Knows
nothing of requests. The API and the worker import this, so it is `tokenizers` alone (transformers' AutoTokenizer
needs seconds and loads torch).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from engine.chat_template import ChatTemplate, ChatTemplateError, Message
from engine.checkpoint import Checkpoint
from engine.gguf_file import GGUFFile
from engine.gguf_tokenizer import UnsupportedTokenizer, gguf_tokenizer

__all__ = ["ChatTemplateError", "Detokenizer", "Tokenizer", "UnsupportedTokenizer"]

_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """Made by `open`. Safe to share between threads."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, template: str | None, special_tokens: dict[str, str]
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # from here on, text is text
        self._backend = backend
        self._special_tokens = special_tokens
        added = backend.get_added_tokens_decoder()
        self._control_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        self._added_ids = frozenset(added)
        self._template = ChatTemplate(template, special_tokens, self._control_ids) if template else None
        self.byte_level = isinstance(backend.decoder, decoders.ByteLevel)

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> Tokenizer:
        """The tokenizer of a folder (tokenizer.json) or of a GGUF file. Raises `UnsupportedTokenizer`."""
        if checkpoint.kind == "gguf":
            return cls._from_gguf(checkpoint.path)
        return cls._from_folder(checkpoint.path)

    @classmethod
    def _from_folder(cls, folder: Path) -> Tokenizer:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UnsupportedTokenizer(
                f"{folder}: tokenizer.json is missing (tokenizer.model alone is not enough)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise UnsupportedTokenizer(f"{path} cannot be read: {error}") from error
        special = _read_json(folder / "special_tokens_map.json")
        settings = _read_json(folder / "tokenizer_config.json")
        special |= {name: value for name, value in settings.items() if name in _TEMPLATE_TOKENS}
        names = {name: _content(special.get(name)) for name in _TEMPLATE_TOKENS}
        return cls(
            backend,
            template=_template_source(folder, settings),
            special_tokens={name: token for name, token in names.items() if token is not None},
        )

    @classmethod
    def _from_gguf(cls, path: Path) -> Tokenizer:
        metadata = GGUFFile.open(path).metadata
        backend = gguf_tokenizer(metadata)
        tokens = metadata["tokenizer.ggml.tokens"]
        keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
        return cls(
            backend,
            template=metadata.get("tokenizer.chat_template"),
            special_tokens={name: tokens[i] for name, i in ids.items() if i is not None},
        )

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size())

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with what the checkpoint puts around a text (bos, where it does).

        Raises ValueError for text with lone surrogates.
        """
        return self._ids(text, add_special_tokens=True)

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a chat, as transformers' `apply_chat_template(tokenize=False)`.

        `messages`: maps with `role` and `content`, both strings. Raises `ChatTemplateError`.
        """
        return self._chat_template().render(messages, add_generation_prompt=add_generation_prompt).text

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a chat: the template's control tokens are control tokens, those in content are text."""
        rendered = self._chat_template().render(messages, add_generation_prompt=add_generation_prompt)
        token_ids: list[int] = []
        at = 0
        for match in self._controls(rendered.nonce).finditer(rendered.guarded):
            token_ids += self.encode_part(rendered.guarded[at : match.start()].replace(rendered.nonce, ""))
            token_ids.append(self._control_ids[match.group()])
            at = match.end()
        return token_ids + self.encode_part(rendered.guarded[at:].replace(rendered.nonce, ""))

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token adds to the text of a `byte_level` tokenizer; b"" for a control token."""
        token = self._backend.id_to_token(token_id)
        if token is None or token in self._control_ids:
            return b""
        try:
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        except KeyError:  # an added token written as it is read
            return token.encode()

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise ChatTemplateError("this checkpoint has no chat template: send a prompt instead of messages")
        return self._template

    def _controls(self, nonce: str) -> re.Pattern[str]:
        alternatives = "|".join(map(re.escape, sorted(self._control_ids, key=len, reverse=True)))
        return re.compile(f"(?<!{nonce})(?:{alternatives})" if alternatives else r"(?!)")

    def encode_part(self, text: str) -> list[int]:
        """Token ids of text inside another text: nothing is put around it. Raises ValueError as `encode` does."""
        return self._ids(text, add_special_tokens=False) if text else []

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError:  # what the library says of lone surrogates
            raise ValueError("the text is not valid Unicode") from None


class Detokenizer:
    """Text of a growing list of tokens, a piece per token; a character split over tokens comes when it is whole.

    All pieces together are `Tokenizer.decode` of all tokens. For tokenizers that are not byte-level the last
    few tokens are decoded again each time (after vLLM's `detokenize_incrementally`).
    """

    _PATIENCE = 16  # tokens a character may need before its replacement sign is taken as meant

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.byte_level else None
        self._token_ids: list[int] = []  # since a point where text and tokens last agreed
        self._num_read = 0  # of those, already given out

    def push(self, token_id: int) -> str:
        """The text this token completes, possibly none."""
        if self._utf8 is not None:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._token_ids.append(token_id)
        text = self._unread()
        if not text or (text.endswith("�") and len(self._token_ids) - self._num_read < self._PATIENCE):
            return ""
        del self._token_ids[: self._num_read]
        self._num_read = len(self._token_ids)
        return text

    def flush(self) -> str:
        """What was held back, as it stands."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        text = self._unread()
        self._num_read = len(self._token_ids)
        return text

    def _unread(self) -> str:
        read = self._tokenizer.decode(self._token_ids[: self._num_read])
        return self._tokenizer.decode(self._token_ids)[len(read) :]


def _byte_of_char() -> dict[str, int]:
    # GPT-2's printable stand-ins for bytes (Radford et al. 2019, `bytes_to_unicode`).
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedTokenizer(f"{path} is not valid JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _content(token: Any) -> str | None:
    """Special tokens are written as strings, or as maps with a `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _template_source(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's: one template, or several of which `default` is taken."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None
