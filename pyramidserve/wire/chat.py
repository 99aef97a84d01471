"""Conversations, with the tools that they may call, to and from their messages."""

import json
from collections.abc import Iterable
from typing import Any, cast, get_args

from google.protobuf.json_format import MessageToDict

from pyramidserve.chat import Chat
from pyramidserve.errors import InvalidRequestError
from pyramidserve.tools import Tool, ToolCall, ToolCallPart, Tools
from pyramidserve.types import ChatMessage, Role
from pyramidserve.v1 import inference_pb2 as pb


def chat_to_message(chat: Chat) -> pb.ChatPrompt:
    """The message of ``chat``. Raises InvalidRequestError where JSON has no word for something."""
    message = pb.ChatPrompt(
        messages=map(_message_of, chat.messages),
        continue_final_message=chat.continues,
        tools=[pb.Tool(**vars(tool) | {"parameters": _json(tool)}) for tool in chat.tools.tools],
        tool_choice=chat.tools.choice if chat.tools.tools else "",
        single_tool_call=chat.tools.single,
    )
    if chat.variables:
        message.template_variables.update(chat.variables)
    return message


def chat_from_message(message: pb.ChatPrompt) -> Chat:
    """What ``message`` asks for. Raises InvalidRequestError."""
    messages = messages_from_chat(message)
    given = message.HasField("continue_final_message")
    tools = Tools(
        tuple(Tool(each.name, each.description, _parameters(each)) for each in message.tools),
        message.tool_choice or "auto",
        message.single_tool_call,
    )
    variables: dict[str, Any] = MessageToDict(message.template_variables)
    return Chat.of(
        messages,
        message.continue_final_message if given else None,
        tools,
        variables,
    )


def messages_from_chat(message: pb.ChatPrompt) -> tuple[ChatMessage, ...]:
    """What was said, without what the reply may call. Raises InvalidRequestError."""
    if not message.messages:
        raise InvalidRequestError("chat has 0 messages; give at least one")
    return tuple(map(_message_from, message.messages))


def parts_to_messages(parts: Iterable[ToolCallPart]) -> list[pb.ToolCallPart]:
    """The messages of ``parts``."""
    return [pb.ToolCallPart(**vars(part)) for part in parts]


def parts_from_messages(messages: Iterable[pb.ToolCallPart]) -> tuple[ToolCallPart, ...]:
    """What is new of calls."""
    return tuple(ToolCallPart(each.index, each.id, each.name, each.arguments) for each in messages)


def _message_of(message: ChatMessage) -> pb.ChatMessage:
    return pb.ChatMessage(
        role=message.role,
        content=message.content,
        tool_calls=[pb.ToolCall(**vars(call)) for call in message.tool_calls],
        tool_call_id=message.tool_call_id,
    )


def _message_from(message: pb.ChatMessage) -> ChatMessage:
    roles = get_args(Role)
    if message.role not in roles:
        raise InvalidRequestError(
            f"chat role is {message.role!r:.40}; it must be one of {', '.join(roles)}"
        )
    calls = tuple(ToolCall(each.id, each.name, each.arguments) for each in message.tool_calls)
    if calls and message.role != "assistant":
        raise InvalidRequestError(
            f"tool_calls are in a message of the {message.role}; only the assistant's has any"
        )
    return ChatMessage(cast(Role, message.role), message.content, calls, message.tool_call_id)


def _json(tool: Tool) -> str:
    try:
        return json.dumps(tool.parameters)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"parameters of tool {tool.name!r:.80} are no JSON schema: {error}"
        ) from error


def _parameters(tool: pb.Tool) -> dict[str, Any]:
    try:
        read = json.loads(tool.parameters or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"parameters of tool {tool.name!r:.80} are no JSON: {error}") from error
    if not isinstance(read, dict):
        raise InvalidRequestError(
            f"parameters of tool {tool.name!r:.80} are {tool.parameters!r:.40}; give the JSON schema of an "
            "object"
        )
    return read
