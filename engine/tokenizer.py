"""Tokenizer: text to token ids and back, for one checkpoint, without torch.

Owns the rule that text from a client is text: control tokens spelled in a prompt or a message are encoded as
ordinary characters, and only the checkpoint's own post-processor and chat template write real ones
(`control_tokens` says how). Where no text spells one, the ids are those of transformers. Knows nothing of requests.
The API and the worker import this, so it is `tokenizers` alone (transformers' AutoTokenizer needs seconds and loads
torch).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import decoders

from engine.chat_template import ChatTemplate, ChatTemplateError, Message
from engine.checkpoint import Checkpoint
from engine.control_tokens import sealed
from engine.gguf_families import END_SPELLINGS
from engine.gguf_file import GGUFFile
from engine.gguf_tokenizer import UnsupportedTokenizer, gguf_tokenizer
from engine.special_tokens import SpecialTokens
from engine.template_variables import TemplateVariables

__all__ = ["ChatTemplateError", "Tokenizer", "UnsupportedTokenizer"]

_METASPACE = "▁"  # SentencePiece's space (Kudo and Richardson 2018)
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # and its tokens of single bytes


class Tokenizer:
    """Made by `open`, or of the text of a tokenizer.json. Safe to share between threads."""

    def __init__(self, definition: str, *, template: str | None, special_tokens: SpecialTokens) -> None:
        self._backend, self._controls = sealed(definition, special_tokens.spellings)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.control_ids = frozenset(self._controls.ids.values())
        self._template = (
            ChatTemplate(template, special_tokens.names, self._controls.stand_ins) if template else None
        )
        self.byte_level = isinstance(self._backend.decoder, decoders.ByteLevel)

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> Tokenizer:
        """The tokenizer of a folder (tokenizer.json) or of a GGUF file. Raises `UnsupportedTokenizer`, also where it
        knows tokens that the model does not."""
        if checkpoint.kind == "gguf":
            tokenizer = cls._from_gguf(checkpoint.path)
        else:
            tokenizer = cls._from_folder(checkpoint.path)
        last, rows = tokenizer._last_id(), checkpoint.config.vocab_size
        if last >= rows:
            raise UnsupportedTokenizer(
                f"{checkpoint.path}: the tokenizer has token ids up to {last}, the model's vocab_size is {rows}: "
                "they do not belong together. Use the tokenizer files that came with the weights"
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size())

    def to_json(self) -> str:
        """All of it as the text of a tokenizer.json, whatever file it came from."""
        return self._controls.unseal(self._backend.to_str())

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with what the checkpoint puts around a text (bos, where it does).

        Raises ValueError for text with lone surrogates.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of several texts at once; meanwhile other threads run. Raises as `encode`."""
        return self._ids(texts, add_special_tokens=True)

    def encode_part(self, text: str) -> list[int]:
        """Token ids of text inside another text: nothing is put around it. Raises ValueError as `encode` does."""
        return self._ids([text], add_special_tokens=False)[0] if text else []

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: TemplateVariables | None = None,
    ) -> str:
        """The text of a chat, as transformers' `apply_chat_template(tokenize=False, **variables)`.

        `messages`: maps with `role` and `content`, both strings. Raises `ChatTemplateError`.
        """
        rendered = self._rendered(messages, add_generation_prompt, variables)
        return self._controls.stand_ins.put_back(rendered)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: TemplateVariables | None = None,
    ) -> list[int]:
        """Token ids of a chat: the template's control tokens are control tokens, those in content and `variables` are
        text. Raises `ChatTemplateError`."""
        rendered = self._rendered(messages, add_generation_prompt, variables)
        return self._controls.encode(self._backend, rendered)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        if skip_special_tokens:
            return str(self._backend.decode([i for i in token_ids if i not in self.control_ids]))
        return self._controls.unseal(self._backend.decode(list(token_ids), skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token adds to a text; b"" for a control token. Exact for a `byte_level` tokenizer; for
        SentencePiece's the start of a text may lose a space that its first token has."""
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self.control_ids:
            return b""
        if not self.byte_level:
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes.fromhex(byte[1]) if byte else token.replace(_METASPACE, " ").encode()
        try:
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        except KeyError:  # an added token written as it is read
            return token.encode()

    def token_text(self, token_id: int) -> str:
        """One token as people read it: a part of a character as its replacement sign, a control token by its name."""
        if token_id in self.control_ids:
            return self._controls.unseal(str(self._backend.id_to_token(token_id)))
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def id_of(self, token: str) -> int | None:
        """The token that is spelled so, as its files write it; None: there is none."""
        known = self._controls.ids.get(token)
        return self._backend.token_to_id(token) if known is None else known

    def is_skipped(self, token_id: int) -> bool:
        """Whether `decode` leaves the token out: a control token, or none at all."""
        return token_id in self.control_ids or self._backend.id_to_token(token_id) is None

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is a byte that a tokenizer without byte-level tokens falls back to, as `<0x0A>`."""
        return bool(_BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or ""))

    @classmethod
    def _from_folder(cls, folder: Path) -> Tokenizer:
        settings = _read_json(folder / "tokenizer_config.json")
        special_tokens_map = _read_json(folder / "special_tokens_map.json")
        return cls._made(
            str(folder),
            _definition(folder),
            template=_template_source(folder, settings),
            special_tokens=SpecialTokens.read(settings, special_tokens_map),
        )

    @classmethod
    def _made(
        cls, origin: str, definition: str, *, template: str | None, special_tokens: SpecialTokens
    ) -> Tokenizer:
        try:
            return cls(definition, template=template, special_tokens=special_tokens)
        except ChatTemplateError as error:
            raise UnsupportedTokenizer(f"{origin}: {error}") from None
        except Exception as error:  # tokenizers raises bare Exception
            raise UnsupportedTokenizer(f"{origin}: the tokenizer cannot be read: {error}") from error

    @classmethod
    def _from_gguf(cls, path: Path) -> Tokenizer:
        metadata = GGUFFile.open(path).metadata
        definition = gguf_tokenizer(metadata).to_str()
        tokens = metadata["tokenizer.ggml.tokens"]
        keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
        names = {name: tokens[i] for name, i in ids.items() if i is not None}
        return cls._made(
            str(path),
            definition,
            template=metadata.get("tokenizer.chat_template"),
            special_tokens=SpecialTokens(names, END_SPELLINGS.union(names.values())),
        )

    def _rendered(
        self, messages: Sequence[Message], prompt: bool, variables: TemplateVariables | None
    ) -> str:
        if self._template is None:
            raise ChatTemplateError("this checkpoint has no chat template: send a prompt instead of messages")
        return self._template.render(messages, add_generation_prompt=prompt, variables=variables)

    def _last_id(self) -> int:
        last = self._backend.get_vocab_size(with_added_tokens=False) - 1
        return max(last, *self._backend.get_added_tokens_decoder(), -1)

    def _ids(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        try:
            # without offsets, which nobody reads, and which take half as much time again
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError:  # what the library says of lone surrogates
            raise ValueError("the text is not valid Unicode") from None
        return [list(encoding.ids) for encoding in found]


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


def _definition(folder: Path) -> str:
    path = folder / "tokenizer.json"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        found = next((name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()), None)
        raise UnsupportedTokenizer(
            f"{folder}: tokenizer.json is missing"
            + (f" ({found} alone is not enough)" if found else "")
            + ". Where transformers, sentencepiece and protobuf are installed, AutoTokenizer.from_pretrained(folder)"
            ".save_pretrained(folder) writes it"
        ) from None
    except (OSError, ValueError) as error:
        raise UnsupportedTokenizer(f"{path} cannot be read: {error}") from None


def _template_source(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's: one template, or several of which `default` is taken; else
    that of chat_template.json, where transformers 4 put the templates of models that see as well."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UnsupportedTokenizer(f"{path} cannot be read: {error}") from None
    source = settings.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(source, list):
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None
