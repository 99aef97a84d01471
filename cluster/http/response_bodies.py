"""What clients send to /v1/responses, without state of the server's."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from cluster.http.bodies import Body, MessageBody, Shared, TextPart
from cluster.http.constraints import FormatBody


class CallItemBody(Body):
    """A call that the assistant has written."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = ""


class OutputItemBody(Body):
    """What a call has returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextPart]


def _kind(item: Any) -> Any:
    """Of messages, clients may leave out that they are some."""
    return item.get("type", "message") if isinstance(item, Mapping) else getattr(item, "type", "message")


Item = Annotated[
    Annotated[MessageBody, Tag("message")]
    | Annotated[CallItemBody, Tag("function_call")]
    | Annotated[OutputItemBody, Tag("function_call_output")],
    Discriminator(_kind),
]


class FunctionToolBody(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenToolBody(Body):
    """A tool that is to be called."""

    type: Literal["function"]
    name: str


class TextBody(Body):
    format: FormatBody | None = None


class ResponseBody(Shared):
    """POST /v1/responses, without state of the server's"""

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextBody | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    tools: list[FunctionToolBody] | None = None
    tool_choice: str | ChosenToolBody | None = None
    parallel_tool_calls: bool | None = None
