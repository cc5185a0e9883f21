"""Grammars: compiles what requests ask for into automata over this model's tokens, and keeps the last ones.

Owns the tokenizer as the library wants it, and a small cache. Safe to use from several threads, so that nothing here
need run on the thread that steps (`compiling`). Knows no requests. No torch.

A compile is bounded (`grammar_source`), so threads will do: no process is needed that could be killed. The first mask
is made at once, because an automaton is built while masks are made: most of what is too complex shows here and not in
a step that others share.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from functools import cached_property, partial
from typing import TYPE_CHECKING

from engine.grammar_source import limits, shortened, source_of
from engine.matcher import Matcher
from engine.reasoning import ReasoningFormat
from engine.request import Begins
from engine.structured_outputs import StructuredOutputsParams
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CACHED = 128


class GrammarError(ValueError):
    """A wish that cannot be honoured; the message names the field. `code` is that of a `RequestError`."""

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.code = code


class Grammar:
    """One compiled grammar, for any number of samples."""

    def __init__(self, tokenizer: LLTokenizer, params: StructuredOutputsParams) -> None:
        """Raises `GrammarError`."""
        self.num_words = (tokenizer.vocab_size + 31) // 32
        self.spoiled = False  # somebody met a limit of what is shared: new samples start from a new one
        self._tokenizer = tokenizer
        try:
            self._source = source_of(params)
        except ValueError as error:
            raise GrammarError(f"{params.param}: {error}") from None
        self._state = self._compiled()
        first = self._state.deep_copy()
        if not first.is_error():
            first.compute_bitmask()
        if first.is_error():
            raise GrammarError(f"{params.param}: {shortened(first.get_error())}")

    def shared(self) -> LLMatcher:
        """A state at the start, which shares its automaton with all others that came from here."""
        return self._state.deep_copy()

    def alone(self) -> LLMatcher:
        """A state at the start that shares nothing."""
        self.spoiled = True
        return self._compiled()

    def _compiled(self) -> LLMatcher:
        from llguidance import LLMatcher

        return LLMatcher(self._tokenizer, self._source, log_level=0, limits=limits())


class Grammars:
    """For one model: its tokenizer, the length of its logits, what ends its sequences (at least one id), and how it
    marks what it thinks."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        reasoning: ReasoningFormat | None = None,
    ) -> None:
        self._text_tokenizer = tokenizer
        self._reasoning = reasoning
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._eos_token_ids = list(eos_token_ids)
        self._cached: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer_lock = threading.Lock()

    def matchers(
        self, params: StructuredOutputsParams, generated: list[tuple[int, ...]], begins: Begins = "answer"
    ) -> list[Matcher]:
        """One matcher per sample, each behind what its sample has generated already. Raises `GrammarError`."""
        grammar, form = self._grammar(params), self._reasoning
        reasons = (partial(form.splitter, begins), form.openers, self._eos_token_ids) if form else ()
        matchers = [Matcher(grammar, *reasons) for _ in generated]
        for matcher, token_ids in zip(matchers, generated, strict=True):
            matcher.follow(token_ids, 0)
            if matcher.error:
                message = f"generated: is not what {params.param} allows: {matcher.error}"
                raise GrammarError(message, "invalid_checkpoint")
        return matchers

    def _grammar(self, params: StructuredOutputsParams) -> Grammar:
        with self._lock:
            known = self._cached.get(params)
            if known is not None and not known.spoiled:
                self._cached.move_to_end(params)
                return known
        with self._tokenizer_lock:
            tokenizer = self._tokenizer
        made = Grammar(tokenizer, params)
        with self._lock:
            self._cached[params] = made
            self._cached.move_to_end(params)
            while len(self._cached) > MAX_CACHED:
                self._cached.popitem(last=False)
        return made

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise GrammarError("structured_outputs: the package llguidance is not installed here") from None
        try:
            return LLTokenizer(
                _plain_decoder(self._text_tokenizer.to_json()),
                n_vocab=self._vocab_size,
                eos_token=self._eos_token_ids,
            )
        except ValueError as error:
            raise GrammarError(
                f"structured_outputs: cannot be had with this checkpoint's tokenizer: {str(error)[:300]}"
            ) from None


def _plain_decoder(tokenizer_json: str) -> str:
    """The library knows `▁` for a space only where it is written out as a replacement."""
    value = json.loads(tokenizer_json)
    decoder = value.get("decoder") or {}
    if decoder.get("type") == "Metaspace":
        space = {"type": "Replace", "pattern": {"String": decoder["replacement"]}, "content": " "}
        value["decoder"] = {
            "type": "Sequence",
            "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}],
        }
    return json.dumps(value)
