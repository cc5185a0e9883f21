"""SpecialTokens: which tokens the files beside tokenizer.json call special, and by which names.

Owns the reading of tokenizer_config.json and special_tokens_map.json as transformers reads them: a token that they
name is a control token, whatever tokenizer.json says of it, and templates know some by name. Knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_NAMED = "_token"  # how the name of a field ends that holds one token
_SEVERAL = ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """`names`: template variable, such as `bos_token` → spelling. `spellings`: those of all special tokens."""

    names: Mapping[str, str] = field(default_factory=dict)
    spellings: frozenset[str] = frozenset()

    @classmethod
    def read(cls, settings: Mapping[str, Any], special_tokens_map: Mapping[str, Any]) -> SpecialTokens:
        """`settings`: tokenizer_config.json, which wins."""
        named: dict[str, Any] = {}
        listed: list[Any] = []
        for source in (special_tokens_map, settings):
            named |= {name: value for name, value in source.items() if name.endswith(_NAMED)}
            for value in map(source.get, _SEVERAL):
                if isinstance(value, dict):
                    named |= value
                elif isinstance(value, list):
                    listed += value
        names = {name: token for name, value in named.items() for token in _spelling(value)}
        added = settings.get("added_tokens_decoder")
        for token in added.values() if isinstance(added, dict) else ():
            if isinstance(token, dict) and token.get("special") is True:
                listed.append(token)
        spellings = {token for value in listed for token in _spelling(value)}
        return cls(names, frozenset(spellings | set(names.values())))


def _spelling(token: Any) -> Iterator[str]:
    """Tokens are written as strings, or as maps with a `content`; anything else, as null, is none."""
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str) and token:
        yield token
