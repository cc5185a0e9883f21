"""A key's text: found by its public part, told from a typing mistake without asking anybody, kept as a hash."""

from __future__ import annotations

import hashlib
import hmac
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import key_text
from jobs.key_text import BadKey, KeyText, new_key, parse_key


def test_a_key_is_read_back() -> None:
    key = new_key()
    assert len(key.text) == 65
    assert key.text.startswith("np_")
    assert key.id == "key_" + key.text[3:15]
    assert parse_key(key.text) == key
    assert key.hash == hashlib.sha256(key.text.encode()).hexdigest()
    assert key.text not in repr(key)
    assert key.text[16:] not in repr(key)


def test_keys_are_random() -> None:
    made = [new_key() for _ in range(200)]
    assert len({key.id for key in made}) == 200
    secrets = {key.text[16:59] for key in made}
    assert len(secrets) == 200
    for place in range(1, 43):  # the first digit of 256 bits in 43 digits of base 62 has fewer values
        assert len({secret[place] for secret in secrets}) > 30, "every digit varies"


def test_a_typing_mistake_is_told_from_a_wrong_key() -> None:
    text = new_key().text
    for place in range(3, len(text)):
        if text[place] == "_":
            continue
        wrong = text[:place] + ("a" if text[place] != "a" else "b") + text[place + 1 :]
        with pytest.raises(BadKey, match="checksum"):
            parse_key(wrong)
    swapped = next(
        text[:i] + text[i + 1] + text[i] + text[i + 2 :] for i in range(20, 60) if text[i] != text[i + 1]
    )
    with pytest.raises(BadKey, match="checksum"):
        parse_key(swapped)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[:-1],
        lambda text: text + "x",
        lambda text: text + "\n",
        lambda text: " " + text,
        lambda text: text.replace("np_", "sk-"),
        lambda text: text.replace("np_", "NP_"),
        lambda text: text[:30] + "é" + text[31:],
        lambda text: text[:30] + "_" + text[31:],
        lambda text: text[:20] + "٣" + text[21:],
    ],
)
def test_other_shapes(change: Any) -> None:
    text = change(new_key().text)
    with pytest.raises(BadKey, match="is not an API key") as caught:
        parse_key(text)
    assert text[4:] not in str(caught.value) or not text[4:]


def test_hashes_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bool] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(hmac.compare_digest(one, other))
        return compared[-1]

    monkeypatch.setattr(key_text, "hmac", SimpleNamespace(compare_digest=compare))
    key = new_key()
    assert key.has_hash(key.hash)
    assert not key.has_hash(new_key().hash)
    assert not key.has_hash("")
    assert not KeyText(key.id, new_key().text).has_hash(key.hash)
    assert compared == [True, False, False, False]
