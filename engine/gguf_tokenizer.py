"""A `tokenizers.Tokenizer` made of the vocabulary inside a GGUF file.

Owns the translation of llama.cpp's tokenizer metadata: byte-level BPE (`tokenizer.ggml.model` = `gpt2`) with the
pre-tokenizers named below, and SentencePiece vocabularies (`llama`), whose scores say in which order pieces merge.
Other pre-tokenizers are refused by name, because a nearly right split gives wrong tokens without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer

from engine.gguf_families import CONTROL, USER_DEFINED
from engine.model_config import UnsupportedCheckpoint

_UNKNOWN = 2  # llama.cpp's type

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SEED = _QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's own rule for files that name none
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


class UnsupportedTokenizer(UnsupportedCheckpoint):
    """This checkpoint's tokenizer cannot be used. The message says why."""


def _splits(*patterns: str) -> PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_apart() -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


_PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "default": lambda: _splits(*_DEFAULT),
    "seed-coder": lambda: _splits(_SEED),
    "tekken": lambda: _splits(_TEKKEN),
    **dict.fromkeys(("gpt-2", "olmo", "phi-2"), _gpt2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _digits_apart),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), lambda: _splits(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), lambda: _splits(_QWEN2)),
}
# a piece that is a token is not built by merges
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "tekken")


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises `UnsupportedTokenizer` naming the metadata key and what is allowed."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if model not in ("gpt2", "llama"):
        raise UnsupportedTokenizer(
            f"tokenizer.ggml.model is {model!r}; supported: gpt2 (byte-level BPE), llama (SentencePiece)"
        )
    if model == "gpt2" and pre not in _PRE_TOKENIZERS:
        raise UnsupportedTokenizer(
            f"tokenizer.ggml.pre is {pre!r}; supported: {', '.join(sorted(_PRE_TOKENIZERS))}"
        )
    try:
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        types: list[int] = metadata.get("tokenizer.ggml.token_type", [])
        if model == "llama":
            tokenizer = _sentencepiece(metadata, tokens, types)
        else:
            tokenizer = _byte_level(metadata, tokens, pre)
        # Both keep the ids they have in the vocabulary.
        tokenizer.add_special_tokens(_added(tokens, types, CONTROL))
        tokenizer.add_tokens(_added(tokens, types, USER_DEFINED))
        tokenizer.post_processor = _around(metadata, tokens, bos=model == "llama" or pre in _BOS_BY_DEFAULT)
    except KeyError as error:
        raise UnsupportedTokenizer(f"{error.args[0]} is missing") from None
    except Exception as error:  # tokenizers raises bare Exception for merges that name no token
        raise UnsupportedTokenizer(f"the GGUF vocabulary is broken: {error}") from error
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], pre: str) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    if pre in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """BPE whose merges follow from the scores: the pair that makes the piece of the highest score goes first."""
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=False) if kind == _UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges(vocabulary, metadata["tokenizer.ggml.scores"]),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    # Phi-3's own tokenizer.json puts a space before every text part
    if metadata.get("general.architecture") == "phi3":
        tokenizer.normalizer = normalizers.Sequence(
            [*[normalizers.Prepend("▁")][: int(prefix)], normalizers.Replace(" ", "▁")]
        )
    else:
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best piece first; of one piece, longest left part first,
    as transformers orders them."""
    found = []
    for piece, token_id in vocabulary.items():
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[token_id], -len(left), -len(right), token_id, left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _around(
    metadata: Mapping[str, Any], tokens: list[str], *, bos: bool
) -> processors.TemplateProcessing | None:
    """What stands before and behind a text. `bos`: whether it has one where the file does not say."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    first = ids["bos"] if metadata.get("tokenizer.ggml.add_bos_token", bos) else None
    last = ids["eos"] if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if first is None and last is None:
        return None
    before = [] if first is None else [tokens[first]]
    behind = [] if last is None else [tokens[last]]
    return processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *(f"{token}:1" for token in before), "$B:1", *behind],
        special_tokens=[(tokens[i], i) for i in dict.fromkeys((first, last)) if i is not None],
    )


def _added(tokens: list[str], types: list[int], wanted: int) -> list[AddedToken]:
    return [
        AddedToken(token, special=wanted == CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=False)
        if kind == wanted
    ]
