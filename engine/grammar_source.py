"""Grammar source: what the grammar library is given to compile, and within which limits.

Owns the translation of a form into the library's own language, the limits of its size, and the refusal that needs no
tokenizer, so that a door may say it before a job is accepted. Refuses to know tokenizers (`grammars`). Light: no
torch, no numpy, and the library itself is loaded when a form is first asked for.

The limits are counts, not seconds, so what is refused does not depend on how busy the machine is. They bound a
compile to well under a second, whatever is asked for (tests/bench/bench_grammar.py tries).
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING

from engine.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MAX_REASON = 300  # characters of the library's own words


@lru_cache(maxsize=256)
def complaint(params: StructuredOutputsParams) -> str | None:
    """Why no model can be held to `params`; None where that shows only when it is compiled for one, or never.
    Takes some 30 ms at most, whatever is asked for."""
    try:
        from llguidance import LLMatcher

        said = LLMatcher.validate_grammar(source_of(params), None, limits=limits())
    except ImportError:
        return None
    except ValueError as error:
        return str(error)
    return shortened(said) if said else None


def source_of(params: StructuredOutputsParams) -> str:
    """What the library compiles. Raises ValueError in words for the client."""
    from llguidance import LLMatcher, grammar_from

    try:
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
    except (ValueError, RecursionError) as error:
        raise ValueError(shortened(str(error))) from None


def limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_grammar_size=5_000,  # symbols; a schema of 500 properties has fewer
        max_items_in_row=2_000,
        initial_lexer_fuel=100_000,  # expressions of the automaton
        step_lexer_fuel=100_000,
        step_max_items=5_000,  # Earley items of one mask
        max_lexer_states=20_000,  # about 2 kB each
        verbose_errors=False,
    )


def shortened(said: str) -> str:
    """The library's own words, on one line and as long as a client can use."""
    said = said.split("<non-verbose/>")[0].split("<state>")[0].strip()
    if " " not in said:  # nothing, or one word of the library's own
        said = f"the grammar does not allow this {said}"
    return " ".join(said.split())[:MAX_REASON]
