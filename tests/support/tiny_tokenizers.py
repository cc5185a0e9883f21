"""Small tokenizers of every kind that checkpoints bring, with the control tokens of a chat.

Owns their making through `tokenizers`; each is trained on one sentence, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.normalizers import Normalizer

CONTROLS = ("<s>", "</s>", "<|user|>", "<|end|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|user|>{{ message.role }}\n{{ message.content | trim }}"
    "<|end|> {{ message.content }}</s> \n{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}"
)
_TEXT = "the quick brown fox jumps over the lazy dog while the night press prints every page by morning"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(
    *, normalizer: Normalizer | None = None, add_prefix_space: bool = False, **flags: bool
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, show_progress=False, special_tokens=list(CONTROLS), initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return _with_controls(tokenizer, flags)


def pieces(scheme: str | None, **flags: bool) -> Tokenizer:
    """BPE with bytes to fall back to. `scheme`: of Metaspace; None: a normalizer puts the space before, as in Llama's
    older files. Pieces merge into `<s>`, as they do in files made from SentencePiece."""
    merges = [("<", "s"), ("<s", ">"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("o", "x"), ("▁", "▁")]
    letters = dict.fromkeys([*"abcdefghijklmnopqrstuvwxyz<>|/▁.", *("".join(merge) for merge in merges)])
    names = list(dict.fromkeys(["<unk>", *CONTROLS, *_BYTES, *letters]))
    vocabulary = {name: token_id for token_id, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if scheme is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return _with_controls(tokenizer, flags)


def unigram() -> Tokenizer:
    """Its vocabulary holds the spellings of control tokens as pieces of text."""
    names = ["<unk>", *CONTROLS, *_BYTES, "▁the", "▁fox", "he", "▁", *"abcdefghijklmnopqrstuvwxyz<>|/."]
    vocabulary = [(name, 0.0 if name in CONTROLS else -float(i) / 10) for i, name in enumerate(names)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "first")])
    return _with_controls(tokenizer, {})


def _with_controls(tokenizer: Tokenizer, flags: dict[str, bool]) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, **{"normalized": False, **flags}) for token in CONTROLS])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte-level, NFKC, normalized": lambda: byte_level(normalizer=normalizers.NFKC(), normalized=True),
    "byte-level, lowercase": lambda: byte_level(normalizer=normalizers.Lowercase(), normalized=True),
    "byte-level, prefix": lambda: byte_level(add_prefix_space=True),
    "byte-level, lstrip": lambda: byte_level(lstrip=True),
    "byte-level, rstrip": lambda: byte_level(rstrip=True),
    "byte-level, both, word": lambda: byte_level(lstrip=True, rstrip=True, single_word=True),
    "pieces, first": lambda: pieces("first"),
    "pieces, always": lambda: pieces("always"),
    "pieces, never": lambda: pieces("never"),
    "pieces, prepend": lambda: pieces(None),
    "pieces, prepend, normalized": lambda: pieces(None, normalized=True),
    "pieces, first, rstrip": lambda: pieces("first", rstrip=True),
    "unigram": unigram,
}
