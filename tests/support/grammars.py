"""Schemas and grammars that tests of structured outputs share, and the short way to ask for them.

Every schema's language is finite or nearly so, so that even random weights come to its end within `MAX_TOKENS`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

from engine import LLM, SamplingParams, StructuredOutputsParams
from engine.engine import Engine
from engine.request import Completion, Request, RequestId
from tests.support import pressure
from tests.support.tiny import write_tiny_llama

MAX_TOKENS = 400


def _object(properties: dict[str, Any], *, required: list[str] | None = None, **more: Any) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {
        "type": "object",
        "properties": properties,
        "required": names,
        "additionalProperties": False,
    } | more


SCHEMAS: dict[str, dict[str, Any]] = {
    "integers in a range": _object({"a": {"type": "integer", "minimum": -7, "maximum": 120}}),
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
    "numbers in a range": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    "multiples": {"type": "integer", "minimum": 0, "maximum": 60, "multipleOf": 7},
    "booleans and null": _object({"yes": {"type": "boolean"}, "nothing": {"type": "null"}}),
    "enum of mixed types": {"enum": ["red", 3, None, True, {"deep": [1]}]},
    "constant": _object({"kind": {"const": "cat"}, "legs": {"const": 4}}),
    "array with bounds": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "maxItems": 5},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "x"}], "items": False, "minItems": 2},
    "string lengths": {"type": "string", "minLength": 3, "maxLength": 6, "pattern": "^[a-z]*$"},
    "pattern": _object({"plate": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,4}$"}}),
    "formats": _object(
        {"day": {"type": "string", "format": "date"}, "id": {"type": "string", "format": "uuid"}}
    ),
    "nested objects": _object({"outer": _object({"inner": _object({"leaf": {"type": "boolean"}})})}),
    "any of": {"anyOf": [{"type": "boolean"}, _object({"v": {"enum": ["p", "q"]}}), {"const": 0}]},
    "references": {
        "$defs": {"size": {"enum": ["S", "M", "L"]}},
        "type": "array",
        "items": {"$ref": "#/$defs/size"},
        "maxItems": 3,
    },
    "all of": {"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 19}]},
    "nullable, optional": _object({"a": {"type": ["integer", "null"], "minimum": 0, "maximum": 9}}, required=[]),
    "keys beyond ASCII": _object({"größe": {"enum": ["klein", "groß"]}, "名前": {"const": "夜🌙"}}),
    "recursion": {
        "$defs": {
            "next": {"anyOf": [{"const": None}, {"$ref": "#/$defs/list"}]},
            "list": _object({"v": {"enum": [0, 1]}, "next": {"$ref": "#/$defs/next"}}),
        },
        "$ref": "#/$defs/list",
    },
    "a list of records": {
        "type": "array",
        "items": _object(
            {
                "sku": {"type": "string", "pattern": "^[A-Z][0-9]{2}$"},
                "tags": {"type": "array", "items": {"enum": ["new", "old"]}, "maxItems": 2},
            }
        ),
        "minItems": 1,
        "maxItems": 2,
    },
    "bounded extra keys": {
        "type": "object",
        "patternProperties": {"^k[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
}  # fmt: skip

# What a compile or a first mask could choke on, and did in other libraries or with wider limits.
HOSTILE: dict[str, tuple[str, str]] = {
    "nested quantifiers": ("regex", "((a+)+)+b"),
    "repeats of repeats": ("regex", "(a{1000}){1000}"),
    "hidden repeats of repeats": ("regex", "x(a{1000}){1000}"),
    "three repeats": ("regex", "((a{100}){100}){100}"),
    "wide classes": ("regex", r"(\w{1,500}\s?){1,500}"),
    "far look-back": ("regex", "(.*a.{2000}b)+"),
    "deep parentheses": ("regex", "(" * 20_000 + "a" + ")" * 20_000),
    "thousands of alternatives": ("regex", "|".join(f"[a-{chr(98 + i % 24)}]+{i}" for i in range(5000))),
    "look-ahead": ("regex", "(?=a)b"),
    "nullable rules": (
        "grammar",
        "start: " + " ".join(f"r{i}*" for i in range(2000)) + "\n"
        + "\n".join(f'r{i}: "a" | "b" r{i * 7 % 2000}' for i in range(2000)),
    ),
    "fewer nullable rules": (
        "grammar",
        'start: "x" s\ns: ' + " ".join(f"r{i}*" for i in range(450)) + "\n"
        + "\n".join(f'r{i}: "a" | "b" r{i * 7 % 450}' for i in range(450)),
    ),
    "ambiguity": ("grammar", 'start: (a|b|c)*\na: ("x"|"y")*\nb: ("x" "y")*\nc: "x" start "x" | start start'),
    "deep GBNF": ("grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
    "a huge enum": ("json", json.dumps({"enum": [f"v{i * 7919 % 100_000}" for i in range(5500)]})),
    "many optional properties": (
        "json", json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(3000)}})
    ),
    "a union of unions": (
        "json", json.dumps({"anyOf": [{"anyOf": [{"const": f"{i}{j}"} for j in range(50)]} for i in range(50)]})
    ),
    "a product of unions": (
        "json",
        json.dumps({"allOf": [{"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {}}} for j in range(10)]}
                              for i in range(10)]}),
    ),
    "doubling references": (
        "json",
        json.dumps({"$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
                    | {"d30": {"type": "string"}}, "$ref": "#/$defs/d0"}),
    ),
    "a reference to itself": ("json", '{"$ref":"#"}'),
    "a remote reference": ("json", '{"$ref":"http://example.com/x.json"}'),
    "a hundred thousand items": (
        "json", '{"type":"array","items":{"type":"array","minItems":1000},"minItems":100000}'
    ),
    "multiples of a prime": ("json", '{"type":"integer","multipleOf":999999937}'),
    "patterns that overlap": (
        "json",
        json.dumps({"type": "object", "patternProperties": {f"^a.*{i}$": {"type": "string"} for i in range(500)}}),
    ),
    "pattern, format and length": (
        "json", '{"type":"string","pattern":"^(.*a.{25}){3}$","minLength":100,"maxLength":5000,"format":"uri"}'
    ),
}  # fmt: skip


def fits(schema: dict[str, Any], text: str) -> None:
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


def params(temperature: float = 1.0, seed: int = 3, **wish: Any) -> SamplingParams:
    structured = StructuredOutputsParams(**wish)
    return SamplingParams(
        temperature=temperature, seed=seed, max_tokens=MAX_TOKENS, structured_outputs=structured
    )


def request(name: str, sampling: SamplingParams, **fields: Any) -> Request:
    return Request(id=RequestId(name, 1), prompt_token_ids=(5, 6, 7), sampling=sampling, **fields)


def run(engine: Engine, *requests: Request) -> dict[str, Completion]:
    return {key.job_id: done for key, done in pressure.run(engine, requests, poison=False).items()}


def text_of(engine: Engine, completion: Completion) -> str:
    assert completion.error is None, completion.error
    assert engine.tokenizer is not None
    return completion.outputs[0].text(engine.tokenizer.decode)


def texts(llm: LLM, *sampling: SamplingParams) -> list[str]:
    """Of each; all must have ended by themselves."""
    outputs = llm.generate(["the night"] * len(sampling), sampling, use_tqdm=False)
    assert [one.error for one in outputs] == [None] * len(sampling)
    assert {one.outputs[0].finish_reason for one in outputs} == {"stop"}
    return [one.outputs[0].text for one in outputs]


def tiny_llm(folder: Path) -> LLM:
    """Of random weights, which know nothing of any form."""
    write_tiny_llama(folder, num_layers=1, hidden_size=32)
    return LLM(str(folder), threads=1, kv_cache_memory_bytes=1 << 23)


def left_whole(llm: LLM) -> Iterator[Engine]:
    """Its engine for one test, which must leave it empty and whole."""
    yield llm.engine
    assert not llm.engine.has_work
    assert llm.engine.stats()["num_compiling"] == 0
    llm.engine.check()
