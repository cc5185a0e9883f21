"""OpenAPI: what /openapi.json says beyond what FastAPI reads off the routes: bodies, media types, `Idempotency-Key`.

Owns descriptions, for people and for makers of clients, and no check: routes read their bodies themselves, so that
limits come before parsing and every refusal names its field. What a body may hold comes from the models that check
it wherever there is one; tests/story/test_contract.py holds both against each other.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from api.upload import ANCHOR, SECONDS
from jobs import openai_body, responses_body
from jobs.bad_field import NOT_SUPPORTED_YET
from jobs.batch_file import ENDPOINTS
from jobs.body import JobBody
from jobs.files import LONGEST_LIFE, SHORTEST_LIFE, Purpose
from jobs.idempotency import MAX_KEY_CHARS
from jobs.openai_body import CHAT, COMPLETIONS, MAX_COMPLETION_LOGPROBS, MESSAGE_EXTRAS, THOUGHTS
from jobs.retries import RETRIABLE
from jobs.schedule_body import REQUIRED, Missed, ScheduleFields
from jobs.template_kwargs import EFFORT, EFFORTS, NO_EFFORT
from jobs.terms_body import TermsBody

Schema = dict[str, Any]
_REFS: Final = "#/components/schemas/{model}"
_ANYTHING: Final[Schema] = {}
_TEXT: Final[Schema] = {"type": "string"}
_EFFORT: Final[Schema] = {"enum": [NO_EFFORT, *EFFORTS, None]}
_LIFE: Final[Schema] = {"type": "integer", "minimum": SHORTEST_LIFE, "maximum": LONGEST_LIFE}
_IDEMPOTENCY_KEY: Final[Schema] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "The same key with the same request is accepted once, and answered each time.",
    # Printable ASCII; blanks at the ends would not survive the header.
    "schema": {
        "type": "string",
        "minLength": 1,
        "maxLength": MAX_KEY_CHARS,
        "pattern": "^[!-~]([ -~]*[!-~])?$",
    },
}
_MEDIA: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    ("post", CHAT): ("application/json", "text/event-stream"),
    ("post", COMPLETIONS): ("application/json", "text/event-stream"),
    ("get", "/v1/files/{file_id}/content"): ("application/octet-stream",),
    ("get", "/v1/batches/{batch_id}/results"): ("application/jsonl",),
    ("get", "/metrics"): ("text/plain",),
}
_NAMED: Final = (  # operations that heed an Idempotency-Key
    "/v1/jobs",
    "/v1/batches",
    "/v1/jobs/{job_id}/retry",
    "/v1/batches/{batch_id}/retry",
    "/v1/schedules/{schedule_id}/run",
    "/v1/responses",
    CHAT,
    COMPLETIONS,
)


class Application(FastAPI):
    """FastAPI, with the whole of /openapi.json."""

    def openapi(self) -> Schema:
        if self.openapi_schema is None:
            schema = super().openapi()
            _, ours = models_json_schema(
                [(JobBody, "validation"), (TermsBody, "validation"), (ScheduleFields, "validation")],
                ref_template=_REFS,
            )
            models: Schema = ours["$defs"]
            schema["components"]["schemas"] |= models
            for (method, path), body in _bodies(models).items():
                schema["paths"][path][method]["requestBody"] = body
            for path in _NAMED:
                schema["paths"][path]["post"].setdefault("parameters", []).append(_IDEMPOTENCY_KEY)
            for (method, path), media in _MEDIA.items():
                schema["paths"][path][method]["responses"]["200"]["content"] = {
                    one: {"schema": _ANYTHING if one == "application/json" else _TEXT} for one in media
                }
            self.openapi_schema = schema
        return self.openapi_schema


def _bodies(models: Schema) -> dict[tuple[str, str], Schema]:
    """`requestBody` by method and path. `models`: schemas by name, ours."""
    job, terms = models["JobBody"]["properties"], models["TermsBody"]["properties"]
    jobs = {"type": "array", "minItems": 1, "items": {"$ref": _REFS.format(model="JobBody")}}
    metadata = job["metadata"]
    many = _object({"jobs": jobs, "metadata": metadata, **terms}, "jobs")
    schedule = models["ScheduleFields"]["properties"] | {"jobs": jobs}
    schedule["missed"] = _nullable({"enum": list(Missed)})
    changes = schedule | {name: schedule[name] for name in REQUIRED}
    states = {"type": "array", "minItems": 1, "items": {"enum": sorted(RETRIABLE)}}
    again = _json(_object({"states": states}), required=False)
    return {
        ("post", "/v1/jobs"): _json({"anyOf": [_object({**job, **terms}), many]}),
        ("post", "/v1/jobs/{job_id}/retry"): again,
        ("post", "/v1/batches/{batch_id}/retry"): again,
        ("post", "/v1/batches"): _json(_batch(metadata)),
        ("post", "/v1/files"): {"required": True, "content": {"multipart/form-data": {"schema": _file()}}},
        ("post", "/v1/schedules"): _json(_object(schedule, *REQUIRED)),
        ("patch", "/v1/schedules/{schedule_id}"): _json(_object(changes) | {"minProperties": 1}),
        ("post", CHAT): _json(_chat(job)),
        ("post", COMPLETIONS): _json(_completion(job)),
        ("post", "/v1/responses"): _json(_response(job)),
    }


def _json(schema: Schema, *, required: bool = True) -> Schema:
    return {"required": required, "content": {"application/json": {"schema": schema}}}


def _object(properties: Schema, *required: str) -> Schema:
    made: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return made | {"required": list(required)} if required else made


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _file() -> Schema:
    """Forms know only text; the seconds are checked as a number all the same."""
    fields: Schema = {
        "purpose": {"enum": [str(Purpose.BATCH)]},
        ANCHOR: {"enum": ["created_at"]},
        SECONDS: _LIFE,
        "file": {"type": "string", "format": "binary"},
    }
    return _object(fields, "purpose", "file") | {"dependentRequired": {ANCHOR: [SECONDS], SECONDS: [ANCHOR]}}


def _batch(metadata: Schema) -> Schema:
    life = _object({"anchor": {"enum": ["created_at"]}, "seconds": _LIFE}, "anchor", "seconds")
    fields: Schema = {
        "input_file_id": _TEXT,
        "endpoint": {"enum": list(ENDPOINTS)},
        "completion_window": _TEXT,
        "metadata": metadata,
        "output_expires_after": _nullable(life),
    }
    return _object(fields, "input_file_id", "endpoint", "completion_window")


def _off(values: dict[str, tuple[Any, ...]], names: frozenset[str]) -> Schema:
    """Fields of OpenAI that we do not have: only what asks for nothing is taken."""
    return {name: {"enum": [*values.get(name, ()), None]} for name in sorted(names)}


def _openai(job: Schema, *without: str) -> Schema:
    fields = {name: schema for name, schema in job.items() if name not in (*without, "custom_id")}
    fields |= dict.fromkeys(sorted(openai_body.IGNORED), _ANYTHING)
    fields |= _off(openai_body.OFF, NOT_SUPPORTED_YET - {"stream", "stream_options"})
    options = {
        "include_usage": {"type": ["boolean", "null"]},
        "include_obfuscation": {"type": ["boolean", "null"]},
    }
    fields["stream"] = {"type": ["boolean", "null"]}
    fields["stream_options"] = _nullable(_object(options))
    return fields


def _chat(job: Schema) -> Schema:
    text = {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": _part("text")}]}
    roles = {"enum": ["system", "developer", "user", "assistant"]}
    message = _object(
        {
            "role": roles,
            "content": text,
            **dict.fromkeys(sorted(MESSAGE_EXTRAS), _ANYTHING),
            **dict.fromkeys(THOUGHTS, _nullable(_TEXT)),
        },
        "role",
        "content",
    )
    fields = _openai(job, "prompt") | {"messages": {"type": "array", "minItems": 1, "items": message}}
    fields[EFFORT] = _EFFORT
    return _object(fields, "messages")


def _completion(job: Schema) -> Schema:
    fields = _openai(job, "messages", "chat_template_kwargs")
    one = {"type": "string", "minLength": 1}
    fields["prompt"] = {"anyOf": [one, {"type": "array", "minItems": 1, "maxItems": 1, "items": one}]}
    number = {"type": "integer", "minimum": 0, "maximum": MAX_COMPLETION_LOGPROBS}
    fields["logprobs"] = {"anyOf": [{"type": ["boolean", "null"]}, number]}
    return _object(fields, "prompt")


def _part(*types: str) -> Schema:
    return _object({"type": {"enum": list(types)}, "text": _TEXT}, "type", "text")


def _response(job: Schema) -> Schema:
    flag = {"type": ["boolean", "null"]}
    fields = dict.fromkeys(sorted(responses_body.IGNORED), _ANYTHING)
    fields |= _off(responses_body.OFF, responses_body.REFUSED)
    fields |= {name: job[ours] for name, ours in responses_body.TAKEN.items()}
    item = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": _TEXT, "content": _ANYTHING},
    }
    thought = {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["reasoning"]}}}
    fields |= {
        "input": {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": {"anyOf": [item, thought]}}]},
        "instructions": {"type": ["string", "null"]},
        "text": _nullable(_object({"format": {"type": ["object", "null"]}, "verbosity": {"type": "null"}})),
        "reasoning": _nullable(_object({"effort": _EFFORT})),
        "background": flag,
        "store": flag,
    }
    return _object(fields, "input")
