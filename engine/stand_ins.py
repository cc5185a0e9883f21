"""StandIns: characters that no valid text has stand in for some of a client's text while a template works on it.

Owns the exchange and its way back. A stand-in is half of a surrogate pair, which valid text never has alone: a client
cannot send one, so what spells a control token without any was written by the template. One stand-in replaces one
character, so a template may cut, join, reverse and strip a text as usual. Knows no templates and no tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_FIRST, _LAST = 0xD800, 0xDFFF
_STAND_IN = re.compile("[\ud800-\udfff]")


class StandIns:
    """For the control tokens of one tokenizer."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        tokens = sorted(filter(None, control_tokens), key=len, reverse=True)
        alternatives = "|".join(map(re.escape, tokens)) or "(?!)"
        self.spelled = re.compile(alternatives)  # the longest, from left to right
        self._starts = re.compile(f"(?={alternatives})(.)", re.DOTALL)  # of all, also of one inside another
        ends = sorted({letter for token in tokens for letter in (token[0], token[-1])})
        if len(ends) > _LAST + 1 - _FIRST:
            raise ValueError("its control tokens begin and end with too many different letters")
        self._stand_ins = {letter: chr(_FIRST + i) for i, letter in enumerate(ends)}

    def for_ends(self, text: str) -> str:
        """In the place of every letter with which a control token begins or ends."""
        for letter, stand_in in self._stand_ins.items():
            text = text.replace(letter, stand_in)
        return text

    def for_spelled(self, text: str) -> str:
        """In the place of the first letter of every control token that the text spells."""
        return self._starts.sub(lambda found: self._stand_ins[found[1]], text)

    def put_back(self, text: str) -> str:
        for letter, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, letter)
        return text


def has_stand_in(text: str) -> bool:
    """Whether the text is no valid Unicode."""
    return _STAND_IN.search(text) is not None
