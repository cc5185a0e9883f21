"""Grammars: compiles what requests ask for into automata over this model's tokens, and keeps the last ones.

Owns the limits of size, the tokenizer as the library wants it, and a small cache. Safe to use from several
threads, so that nothing here need run on the thread that steps (`compiling`). Knows no requests. No torch.

The limits are counts, not seconds, so what is refused does not depend on how busy the machine is. They bound a
compile to well under a second, whatever is asked for (tests/bench/bench_grammar.py tries): threads do, and no process
that could be killed is needed. The first mask is made at once, because an automaton is built while masks are
made: most of what is too complex shows here and not in a step that others share.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from functools import cached_property
from typing import TYPE_CHECKING

from engine.matcher import Matcher, reason
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
            self._source = _source(params)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"{params.param}: {str(error)[:300]}") from None
        self._state = self._compiled()
        first = self._state.deep_copy()
        if not first.is_error():
            first.compute_bitmask()
        if first.is_error():
            raise GrammarError(f"{params.param}: {reason(first)}")

    def shared(self) -> LLMatcher:
        """A state at the start, which shares its automaton with all others that came from here."""
        return self._state.deep_copy()

    def alone(self) -> LLMatcher:
        """A state at the start that shares nothing."""
        self.spoiled = True
        return self._compiled()

    def _compiled(self) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_grammar_size=5_000,  # symbols; a schema of 500 properties has fewer
            max_items_in_row=2_000,
            initial_lexer_fuel=100_000,  # expressions of the automaton
            step_lexer_fuel=100_000,
            step_max_items=5_000,  # Earley items of one mask
            max_lexer_states=20_000,  # about 2 kB each
            verbose_errors=False,
        )
        return LLMatcher(self._tokenizer, self._source, log_level=0, limits=limits)


class Grammars:
    """For one model: its tokenizer, the length of its logits, and what ends its sequences (at least one id)."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._text_tokenizer = tokenizer
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._eos_token_ids = list(eos_token_ids)
        self._cached: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer_lock = threading.Lock()

    def matchers(self, params: StructuredOutputsParams, generated: list[tuple[int, ...]]) -> list[Matcher]:
        """One matcher per sample, each behind what its sample has generated already. Raises `GrammarError`."""
        grammar = self._grammar(params)
        matchers = [Matcher(grammar) for _ in generated]
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


def _source(params: StructuredOutputsParams) -> str:
    """What the library compiles."""
    from llguidance import LLMatcher, grammar_from

    match params.kind:
        case "json" | "json_object":
            return LLMatcher.grammar_from_json_schema(
                params.json or {"type": "object"},
                overrides={"whitespace_flexible": not params.disable_any_whitespace, "lenient": False},
            )
        case "regex":
            return grammar_from("regex", params.regex or "")
        case "choice":
            return grammar_from("lark", "start: " + " | ".join(map(json.dumps, params.choice or ())))
        case "grammar":
            return grammar_from("grammar", params.grammar or "")


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
