"""Vocabulary: the parts of a request that only make sense for one model's tokens.

Owns the check that token ids exist and that something can be chosen at all, and bad words as token ids. Knows no
pages and no lengths: those are the engine's to check.
"""

from __future__ import annotations

from engine.request import Rejected, Request
from engine.tokenizer import Tokenizer


def check_vocabulary(request: Request, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
    """Raises `Rejected`, which names the field. Stop tokens that the model lacks never come, and do no harm."""
    sampling = request.sampling
    allowed = sampling.allowed_token_ids
    named = {
        "prompt": request.prompt_token_ids,
        "generated": [token_id for sample in request.generated for token_id in sample.token_ids],
        "allowed_token_ids": allowed or (),
        "logit_bias": [token_id for token_id, _ in sampling.biases],
    }
    for name, token_ids in named.items():
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
            code = "invalid_checkpoint" if name == "generated" else "invalid_request"
            raise Rejected(code, f"{name}: has token ids outside 0 to {vocab_size - 1}")
    ends = set(sampling.end_token_ids(eos_token_ids))
    if allowed and sampling.min_tokens and ends.issuperset(allowed):
        raise Rejected(
            "invalid_request",
            "allowed_token_ids: with min_tokens at least one must be a token that ends nothing",
        )


def bad_word_ids(tokenizer: Tokenizer | None, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Each word as the token ids that spell it at the start of a text, and after a space where that is another
    single spelling of the same length (vLLM's rule). Raises `Rejected`."""
    if not words:
        return ()
    if tokenizer is None:
        raise Rejected("invalid_request", "bad_words: this engine has no tokenizer")
    spellings: dict[tuple[int, ...], None] = {}  # in order, each once
    for word in words:
        try:
            plain = tuple(tokenizer.encode_part(word))
            spaced = tuple(tokenizer.encode_part(" " + word.lstrip())) if word.strip() else ()
        except ValueError as error:
            raise Rejected("invalid_request", f"bad_words: {error}") from None
        if plain:
            spellings[plain] = None
        if spaced and (not plain or (spaced[0] != plain[0] and len(spaced) == len(plain))):
            spellings[spaced] = None
    return tuple(spellings)
