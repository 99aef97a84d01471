"""Tools told in messages, for models whose chat templates know of none: as Qwen's and Hermes' tell them."""

import json
from collections.abc import Sequence
from typing import Any

from pyramidserve.tools import Tool, ToolCall
from pyramidserve.types import ChatMessage
from workers.tools.forms import HERMES

ASKED = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def told_in_messages(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> tuple[ChatMessage, ...]:
    """The conversation with ``tools`` in its system message, and calls and results in texts."""
    told: list[ChatMessage] = []
    for at, message in enumerate(messages):
        if message.role == "tool":
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if at and messages[at - 1].role == "tool":
                result = told.pop().content + "\n" + result
            told.append(ChatMessage("user", result))
        elif message.tool_calls:
            said = "\n".join(filter(None, (message.content, *map(_call, message.tool_calls))))
            told.append(ChatMessage("assistant", said))
        else:
            told.append(message)
    if tools:
        asked = ASKED.format(tools="\n".join(json.dumps(described(tool)) for tool in tools))
        system = told.pop(0).content if told[0].role == "system" else ""
        told.insert(0, ChatMessage("system", f"{system}\n\n{asked}" if system else asked))
    return tuple(told)


def described(tool: Tool) -> dict[str, Any]:
    """A tool as OpenAI's API and chat templates have it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _call(call: ToolCall) -> str:
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = call.arguments
    said = json.dumps({"name": call.name, "arguments": arguments})
    return f"{HERMES.opens}\n{said}\n{HERMES.closes}"
