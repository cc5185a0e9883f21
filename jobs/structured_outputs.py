"""The form of a job's text as clients ask for it: OpenAI's `response_format` and vLLM's `structured_outputs`.

Owns the two spellings and their way to the one that the engine knows. What each field may hold is
`engine.structured_outputs`' own. A schema is kept as it came, nulls included, because they mean something in it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from engine.sampling_params import InvalidParameter, StructuredOutputsParams
from jobs.bad_field import Strict

Schema = dict[str, Any]


class StructuredOutputs(Strict):
    """vLLM's field, with its names."""

    json_: Annotated[Any, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool | None = None

    def params(self) -> StructuredOutputsParams:
        """Raises `InvalidParameter`."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name != "json_"}
        given["disable_any_whitespace"] = bool(self.disable_any_whitespace)
        return StructuredOutputsParams(json=self.json_, **given)


class JsonSchema(Strict):
    """`strict` may be given and changes nothing: a schema is always kept to."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's field."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "one_of:response_format.json_schema", "goes with the type json_schema, and with no other"
            )
        return self

    def params(self) -> StructuredOutputsParams | None:
        """None for plain text. Raises `InvalidParameter`."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return StructuredOutputsParams(json_object=True, asked_as="response_format")
        place = "response_format.json_schema.schema"
        try:
            return StructuredOutputsParams(json=self.json_schema.schema_, asked_as=place)
        except InvalidParameter as error:
            raise InvalidParameter(place, error.message) from None
