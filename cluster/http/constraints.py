"""What a reply is to be, as OpenAI's API says it and as vLLM's additions do."""

import json
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Constraint

# Any object, as OpenAI's oldest form of this asks for.
OBJECT: dict[str, Any] = {"type": "object"}
MOST_CHOICES = 1024


class SchemaBody(BaseModel):
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class FormatBody(BaseModel):
    """What `response_format` says; and `text.format` of /v1/responses, with the schema beside the type."""

    model_config = ConfigDict(populate_by_name=True)

    type: str
    json_schema: SchemaBody | None = None
    plain_schema: dict[str, Any] | bool | None = Field(None, alias="schema")


class OutputsBody(BaseModel):
    """What vLLM's `structured_outputs` says."""

    json_schema: dict[str, Any] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=MOST_CHOICES)
    grammar: str | None = None
    json_object: bool | None = None


def constraint_of(asked: FormatBody | None, outputs: OutputsBody | None) -> Constraint | None:
    """What output is held to, if to anything. Raises InvalidRequestError where it is to two things."""
    found = [*_of_format(asked), *_of_outputs(outputs)]
    if len(found) > 1:
        kinds = ", ".join(each.kind for each in found)
        raise InvalidRequestError(
            f"response_format and structured_outputs ask for {kinds}; give one of them"
        )
    return found[0] if found else None


def _of_format(asked: FormatBody | None) -> list[Constraint]:
    if asked is None or asked.type == "text":
        return []
    if asked.type == "json_object":
        return [_json(OBJECT)]
    if asked.type == "json_schema":
        schema = asked.json_schema.json_schema if asked.json_schema else asked.plain_schema
        if schema is None:
            raise InvalidRequestError("response_format is a json_schema without a schema; give one")
        return [_json(schema)]
    raise InvalidRequestError(
        f"response_format type is {asked.type!r:.40}; it must be one of text, json_object, json_schema"
    )


def _of_outputs(outputs: OutputsBody | None) -> list[Constraint]:
    if outputs is None:
        return []
    schema, found = outputs.json_schema, []
    if schema is not None:
        found.append(Constraint("json_schema", schema) if isinstance(schema, str) else _json(schema))
    if outputs.json_object:
        found.append(_json(OBJECT))
    if outputs.regex is not None:
        found.append(Constraint("regex", outputs.regex))
    if outputs.choice is not None:
        found.append(Constraint("regex", "|".join(f"({re.escape(each)})" for each in outputs.choice)))
    if outputs.grammar is not None:
        found.append(Constraint("grammar", outputs.grammar))
    return found


def _json(schema: dict[str, Any] | bool) -> Constraint:
    return Constraint("json_schema", json.dumps(schema))
