"""ControlTokens: a tokenizer that text cannot talk into control tokens.

Owns the seal: letters drawn at random for each tokenizer and inserted into every control token's spelling, behind its
first character, in the added tokens and in the vocabulary: `<s>` becomes `<…<s>`, so that what stands before it has
the same neighbour. A client's text cannot contain the seal, so it stays text, whatever it spells and whatever a
normalizer makes of it. Text that a template writes is sealed where it means control tokens, and then one call encodes
the whole, so spaces, prefixes and flags at the borders come out as without a seal. Knows no templates.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from typing import Any

import tokenizers

from engine.stand_ins import StandIns

_LETTERS = "abcdefghijklmnop"  # small ones: no normalizer changes them


class ControlTokens:
    """`ids`: spelling → id. Made by `sealed`."""

    def __init__(self, ids: dict[str, int], seal: str) -> None:
        self.ids = ids
        self._id_set = frozenset(ids.values())
        self._seal = seal
        self.stand_ins = StandIns(ids)

    def encode(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        """Ids of a text that means control tokens where it spells them. Its stand-ins are put back behind that.

        What the tokenizer does not take where it stands (an old Llama's normalizer puts a space before a text, and
        looks for control tokens behind one) is text, as it is to transformers.
        """
        put_back = self.stand_ins.put_back
        meant = list(self.stand_ins.spelled.finditer(text))
        while True:
            parts, spans, at, length = [], [], 0, 0
            for found in meant:
                before, sealed_token = put_back(text[at : found.start()]), _sealed(found[0], self._seal)
                parts += [before, sealed_token]
                length += len(before) + len(sealed_token)
                spans.append((length - len(sealed_token), length))
                at = found.end()
            encoding = backend.encode("".join(parts) + put_back(text[at:]), add_special_tokens=False)
            taken = [i for i, token_id in enumerate(encoding.ids) if token_id in self._id_set]
            if len(taken) == len(meant):
                return list(encoding.ids)
            offsets = [encoding.offsets[i] for i in taken]
            kept = [
                found
                for found, (start, end) in zip(meant, spans, strict=True)
                if any(first <= start and end <= last for first, last in offsets)
            ]
            if len(kept) == len(meant):  # the others are unknown characters
                return list(encoding.ids)
            meant = kept

    def unseal(self, text: str) -> str:
        return re.sub(f".?{self._seal}", "", text, flags=re.DOTALL)


def sealed(definition: str, named: Collection[str] = ()) -> tuple[tokenizers.Tokenizer, ControlTokens]:
    """The tokenizer of a tokenizer.json's text, with sealed control tokens under their old ids: of its added tokens
    those that are special there, and those that are `named` as such elsewhere.

    Raises Exception, as `tokenizers` does, and ValueError for what is no such file.
    """
    document = json.loads(definition)
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ValueError("it holds no model")
    added: list[dict[str, Any]] = document.get("added_tokens") or []
    for token in added:
        token["special"] = token["special"] or token["content"] in named
    ids = {token["content"]: token["id"] for token in added if token["special"]}
    seal = "".join(secrets.choice(_LETTERS) for _ in range(32))
    for token in added:
        if token["special"]:
            token["content"] = _sealed(token["content"], seal)
    _seal_model(document["model"], ids, seal)
    return tokenizers.Tokenizer.from_str(json.dumps(document)), ControlTokens(ids, seal)


def _sealed(token: str, seal: str) -> str:
    return token[:1] + seal + token


def _seal_model(model: dict[str, Any], controls: Collection[str], seal: str) -> None:
    def renamed(token: str) -> str:
        return _sealed(token, seal) if token in controls else token

    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {renamed(token): token_id for token, token_id in vocabulary.items()}
    else:  # Unigram: pairs of piece and score, in the order of ids
        model["vocab"] = [(renamed(piece), score) for piece, score in vocabulary]
    if model.get("unk_token"):
        model["unk_token"] = renamed(model["unk_token"])
    if model.get("merges"):
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        # Vocabularies made from SentencePiece may put control tokens together from pieces
        model["merges"] = [
            (left, right)
            for left, right in merges
            if left not in controls and right not in controls and left + right not in controls
        ]
