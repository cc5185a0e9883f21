"""Tokenizers as SentencePiece models come in tokenizer.json: spaces written as `▁`, in the two ways that exist.

`byte_fallback`: BPE after Llama 2, what it has no token for comes as bytes. `metaspace`: a unigram model after T5.
Both have `VOCAB_SIZE` tokens, `</s>` is number `EOS_TOKEN_ID`.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

EOS_TOKEN_ID = 2
VOCAB_SIZE = 320
_SPECIAL = ("<unk>", "<s>", "</s>")
_LETTERS = [*"▁abcdefghijklmnopqrstuvwxyz0123456789", *'{}[]":,.-']


def byte_fallback() -> Tokenizer:
    pairs = [("▁", "a"), ("a", "b"), ("▁", "{"), ('"', ":")]
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *_LETTERS]
    tokens += ["".join(pair) for pair in pairs]
    tokens += [f"unused{i}" for i in range(VOCAB_SIZE - len(tokens))]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _with_special_tokens(tokenizer)


def metaspace() -> Tokenizer:
    tokens = [*_SPECIAL, *_LETTERS, "▁a", "ab", "▁{", '":', "é", "🌙"]
    tokens += [f"unused{i}" for i in range(VOCAB_SIZE - len(tokens))]
    tokenizer = Tokenizer(models.Unigram([(token, -float(i)) for i, token in enumerate(tokens)], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return _with_special_tokens(tokenizer)


def write(folder: Path, tokenizer: Tokenizer) -> None:
    """In place of the tokenizer that a checkpoint has."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


def _with_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer
