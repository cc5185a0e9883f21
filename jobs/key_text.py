"""A key as text: `np_`, 12 characters by which it is found, 43 of secret, 6 of checksum.

Owns the making of such a text, the check that tells a typing mistake from a wrong key without asking anybody, and the
hash that is stored instead of it. The secret is 256 random bits, so one SHA-256 is enough: slow hashes are for
passwords that people choose. Knows no tenant and no database.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from dataclasses import dataclass, field
from typing import Final

PREFIX: Final = "np_"
ID_CHARS: Final = 12  # 71 bits
SECRET_BYTES: Final = 32
SECRET_CHARS: Final = 43
CHECK_CHARS: Final = 6
_DIGITS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SHAPE: Final = re.compile(
    rf"{PREFIX}(?P<id>[0-9A-Za-z]{{{ID_CHARS}}})_[0-9A-Za-z]{{{SECRET_CHARS}}}(?P<check>[0-9A-Za-z]{{{CHECK_CHARS}}})"
)


class BadKey(ValueError):
    """The text cannot be one of our keys. The message never holds any of it."""


@dataclass(frozen=True, slots=True)
class KeyText:
    """`id` is public; `text`, the whole of it, is the secret that only its holder has."""

    id: str
    text: str = field(repr=False)

    @property
    def hash(self) -> str:
        """SHA-256 in hex digits: what the database keeps."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def has_hash(self, stored: str) -> bool:
        """Whether `stored` is this key's hash; takes as long for every answer."""
        return hmac.compare_digest(self.hash.encode(), stored.encode())


def new_key() -> KeyText:
    """A fresh key from the operating system's random numbers."""
    id_ = "".join(secrets.choice(_DIGITS) for _ in range(ID_CHARS))
    secret = _base62(int.from_bytes(secrets.token_bytes(SECRET_BYTES)), SECRET_CHARS)
    rest = f"{PREFIX}{id_}_{secret}"
    return KeyText(f"key_{id_}", rest + _checksum(rest))


def parse_key(text: str) -> KeyText:
    """Take a key apart. Raises `BadKey` for another shape and for a checksum that does not match."""
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise BadKey("this is not an API key of Nightpress: those start with np_ and have 65 characters")
    if _checksum(text[:-CHECK_CHARS]) != found["check"]:
        raise BadKey("this API key has a typing mistake: its checksum does not match")
    return KeyText(f"key_{found['id']}", text)


def _checksum(text: str) -> str:
    """CRC-32, as GitHub's tokens have it: it finds mistakes, and protects nothing."""
    return _base62(zlib.crc32(text.encode()), CHECK_CHARS)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))
