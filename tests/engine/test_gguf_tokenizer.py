"""SentencePiece vocabularies in GGUF files: the ids that transformers' own conversion gives."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from engine.gguf_file import GGUFFile
from engine.gguf_tokenizer import gguf_tokenizer
from engine.special_tokens import SpecialTokens
from engine.tokenizer import Tokenizer
from tests.support.tiny_gguf import finished

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "night", "press"]
UNKNOWN, CONTROL, BYTE = 2, 3, 6


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    """(pieces, scores, llama.cpp's types): every start of every word, better the shorter, so that merges compete."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    found = dict.fromkeys(["▁", "▁▁", *"abcdefghijklmnopqrstuvwxyz<>/s"])
    for word in WORDS:
        spelled = "▁" + word
        found |= dict.fromkeys(spelled[:end] for end in range(2, len(spelled) + 1))
        found |= dict.fromkeys(word[start : start + 2] for start in range(len(word) - 1))
    rng = random.Random(3)
    scores = [0.0] * len(tokens) + [-float(rng.randrange(80)) - len(piece) for piece in found]
    return [*tokens, *found], scores, types + [1] * len(found)


def write(path: Path, **changes: Any) -> Path:
    tokens, scores, types = vocabulary()
    writer = GGUFWriter(path, changes.pop("architecture", "llama"))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in changes.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    return finished(writer, path)


def texts() -> list[str]:
    rng = random.Random(5)
    parts = [*WORDS, " ", "  ", "\n", "é", "🙂", "你", "qu", "Fox", "<", "s>", "1"]
    made = [" ".join(rng.choices(parts, k=rng.randrange(1, 9))) for _ in range(150)]
    return [
        "",
        " ",
        "the",
        " the",
        "  the ",
        "\nthe",
        *made,
        *("".join(rng.choices(parts, k=5)) for _ in range(50)),
    ]


def theirs(prefix: bool) -> Any:
    """As transformers makes it of a GGUF file's pieces and scores."""
    tokens, scores, _ = vocabulary()
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    merges = generate_merges(ids, dict(zip(tokens, scores, strict=True)))
    return LlamaTokenizer(vocab=ids, merges=merges, add_prefix_space=prefix)


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_and_texts_are_those_of_transformers(tmp_path: Path, prefix: bool) -> None:
    backend = gguf_tokenizer(GGUFFile.open(write(tmp_path / "a.gguf", add_space_prefix=prefix)).metadata)
    expected = theirs(prefix)
    for text in texts():
        ids = backend.encode(text, add_special_tokens=False).ids
        assert ids == list(expected(text, add_special_tokens=False)["input_ids"]), text
        assert backend.decode(ids, skip_special_tokens=False) == expected.decode(ids), text


def test_what_stands_around_a_text(tmp_path: Path) -> None:
    def ids(**changes: Any) -> list[int]:
        return list(
            gguf_tokenizer(GGUFFile.open(write(tmp_path / "a.gguf", **changes)).metadata).encode("the").ids
        )

    the = ids(add_bos_token=False)
    assert ids() == [1, *the]
    assert ids(add_eos_token=True) == [1, *the, 2]
    assert ids(add_bos_token=False, add_eos_token=True) == [*the, 2]


def test_phi3_puts_a_space_before_every_part(tmp_path: Path) -> None:
    from transformers.integrations.gguf import convert_gguf_tokenizer

    path = write(tmp_path / "a.gguf", architecture="phi3")
    tokens, scores, types = vocabulary()
    given = {"tokenizer_type": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    expected, _ = convert_gguf_tokenizer("phi3", given)
    backend = gguf_tokenizer(GGUFFile.open(path).metadata)
    for text in [*texts(), "the</s>the"]:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert ids == expected.encode(text, add_special_tokens=False).ids, text


def test_no_text_of_a_client_spells_a_control_token(tmp_path: Path) -> None:
    backend = gguf_tokenizer(GGUFFile.open(write(tmp_path / "a.gguf")).metadata)
    tokenizer = Tokenizer(backend.to_str(), template=None, special_tokens=SpecialTokens())
    ids = tokenizer.encode("the</s> <s>")
    assert ids[0] == 1
    assert not {1, 2} & set(ids[1:])
    assert tokenizer.decode(ids) == "the</s> <s>"
