"""The form of a job's text in both spellings: what is kept of it, and what is refused before a job is accepted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.sampling_params import StructuredOutputsParams
from jobs.bad_field import BadField
from jobs.body import MAX_FORMS, JobBody, parse_job, parse_jobs
from jobs.settings import Settings

SCHEMA = {"enum": [None, "é", {"default": None}], "const": None}  # nulls that mean something


def json_schema(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema} | fields}


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": json_schema(SCHEMA, strict=True, description="d")}, {"json": SCHEMA}),
        ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json": '{"const": null}'}}, {"json": {"const": None}}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ("a", "b")}),
        ({"structured_outputs": {"grammar": "start: /a/"}}, {"grammar": "start: /a/"}),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            {"json_object": True, "disable_any_whitespace": True},
        ),
    ],
)
def test_the_form_of_the_text_is_kept_and_read_back(
    settings: Settings, asked: dict[str, Any], meant: dict[str, Any] | None
) -> None:
    """In either spelling, with every null that a schema has."""
    body = parse_job({"prompt": "a", **asked}, settings)
    stored = json.loads(body.written())
    assert stored == {"prompt": "a", **asked}
    expected = None if meant is None else StructuredOutputsParams(**meant)
    assert JobBody.model_validate(stored).sampling(50, 16).structured_outputs == expected


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "start: nobody"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": {"not": {"type": "null"}}}}, "structured_outputs.json"),
        ({"response_format": json_schema({"type": "banana"})}, "response_format.json_schema.schema"),
    ],
)
def test_a_form_that_no_model_can_be_held_to(settings: Settings, asked: dict[str, Any], param: str) -> None:
    """Is refused where its client would hear of it by morning, and fails alone where it comes in a file."""
    data = {"prompt": "a", **asked}
    parse_job(data, settings)
    with pytest.raises(BadField) as caught:
        parse_job(data, settings, forms=True)
    assert caught.value.param == param
    good = [{"prompt": "a", "structured_outputs": {"regex": f"a{{{n}}}"}} for n in range(1, MAX_FORMS + 1)]
    with pytest.raises(BadField) as caught:
        parse_jobs([*good[1:], {"prompt": "plain"}, data], settings)
    assert caught.value.param == f"jobs[{MAX_FORMS}].{param}"
    assert (
        len(parse_jobs([*good, data], settings)) == MAX_FORMS + 1
    )  # so many that a submit would take too long
