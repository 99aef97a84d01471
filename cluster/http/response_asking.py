"""What bodies of /v1/responses ask for."""

from collections.abc import Sequence

from cluster.http.asking import Asked, messages_of, text_of
from cluster.http.bodies import MessageBody
from cluster.http.constraints import constraint_of
from cluster.http.response_bodies import CallItemBody, ChosenToolBody, Item, OutputItemBody, ResponseBody
from cluster.http.settings import settings_of
from pyramidserve.chat import Chat
from pyramidserve.tools import Tool, ToolCall, Tools
from pyramidserve.types import ChatMessage
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.wire import chat_to_message

# What responses are asked to include, of all that OpenAI's have.
LOGPROBS = "message.output_text.logprobs"


def asked_in_response(body: ResponseBody, name: str) -> Asked:
    """The one request that it is. Raises InvalidRequestError."""
    given = body.input
    items = [MessageBody(role="user", content=given)] if isinstance(given, str) else given
    if body.instructions:
        items = [MessageBody(role="system", content=body.instructions), *items]
    request = pb.GenerateRequest(chat=chat_to_message(Chat.of(_said(items), tools=_tools(body))))
    constraint = constraint_of(body.text.format if body.text else None, None)
    told = LOGPROBS in (body.include or ()) or body.top_logprobs
    logprobs = body.top_logprobs or 0 if told else None
    request.MergeFrom(settings_of(body, body.max_output_tokens, constraint, logprobs))
    request.request_id = name
    return Asked(0, request, body.salt)


def _said(items: Sequence[Item]) -> list[ChatMessage]:
    """The conversation; the assistant's calls belong to what it has said just before."""
    said: list[ChatMessage] = []
    for item in items:
        match item:
            case CallItemBody():
                last = said.pop() if said and said[-1].role == "assistant" else ChatMessage("assistant", "")
                call = ToolCall(item.call_id, item.name, item.arguments)
                said.append(ChatMessage("assistant", last.content, (*last.tool_calls, call)))
            case OutputItemBody():
                said.append(ChatMessage("tool", text_of(item.output), tool_call_id=item.call_id))
            case MessageBody():
                said += messages_of([item])
    return said


def _tools(body: ResponseBody) -> Tools:
    choice = body.tool_choice
    return Tools(
        tuple(Tool(each.name, each.description or "", each.parameters or {}) for each in body.tools or ()),
        choice.name if isinstance(choice, ChosenToolBody) else choice or "auto",
        body.parallel_tool_calls is False,
    )
