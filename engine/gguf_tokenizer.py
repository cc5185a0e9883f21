"""A `tokenizers.Tokenizer` made of the vocabulary inside a GGUF file.

Owns the translation of llama.cpp's tokenizer metadata: byte-level BPE (`tokenizer.ggml.model` = `gpt2`) with
the pre-tokenizers named below. SentencePiece vocabularies (`llama`) and other pre-tokenizers are refused by
name, because a nearly right split gives wrong tokens without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types that are matched before any split

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# llama.cpp's own rule for files that name none
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


class UnsupportedTokenizer(ValueError):
    """This checkpoint's tokenizer cannot be used. The message says why."""


def _splits(*patterns: str) -> PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _smollm() -> PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


_PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "default": lambda: _splits(*_DEFAULT),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "llama-bpe": lambda: _splits(_LLAMA3),
    "qwen2": lambda: _splits(_QWEN2),
    "smollm": _smollm,
}


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises `UnsupportedTokenizer` naming the metadata key and what is allowed."""
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise UnsupportedTokenizer(
            f"tokenizer.ggml.model is {model!r}; only gpt2 (byte-level BPE) is supported"
        )
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise UnsupportedTokenizer(
            f"tokenizer.ggml.pre is {pre!r}; supported: {', '.join(sorted(_PRE_TOKENIZERS))}"
        )
    try:
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
        vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    except KeyError as error:
        raise UnsupportedTokenizer(f"{error.args[0]} is missing") from None
    except Exception as error:  # tokenizers raises bare Exception for merges that name no token
        raise UnsupportedTokenizer(f"the GGUF vocabulary is broken: {error}") from error
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    # Both keep the ids they have in the vocabulary.
    tokenizer.add_special_tokens(_added(tokens, types, _CONTROL))
    tokenizer.add_tokens(_added(tokens, types, _USER_DEFINED))
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and bos_id is not None:
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _added(tokens: list[str], types: list[int], wanted: int) -> list[AddedToken]:
    return [
        AddedToken(token, special=wanted == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=False)
        if kind == wanted
    ]
