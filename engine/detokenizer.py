"""Detokenizer: the text of a growing list of tokens, a piece per token.

Owns when a piece of text is whole: a character may be split over tokens, and what a run of bytes stands for is known
when it has ended. Knows no stop strings and no requests.
"""

from __future__ import annotations

import codecs

from engine.tokenizer import Tokenizer


class Detokenizer:
    """Text of a growing list of tokens, a piece per token; a character split over tokens comes when it is whole.

    All pieces together are `Tokenizer.decode` of all tokens. For tokenizers that are not byte-level the last
    few tokens are decoded again each time (after vLLM's `detokenize_incrementally`), and bytes that stand for
    characters come when their run has ended: what follows decides whether all of them are valid.
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
        if self._tokenizer.is_skipped(token_id):  # left out before anything is put together
            return ""
        self._token_ids.append(token_id)
        if self._tokenizer.is_byte(token_id):
            return ""
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
