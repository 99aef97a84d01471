"""What may be given as a prompt, and what it is once it has been read."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex, cast

from pyramidserve.errors import InvalidRequestError
from pyramidserve.integers import whole_number
from pyramidserve.tools import read_tool_calls
from pyramidserve.types import ChatMessage, Role

# A text; token ids, of any integer type; or a conversation, in messages or as OpenAI's API has them.
Prompt = str | Sequence[SupportsIndex] | Sequence[ChatMessage | Mapping[str, Any]]
MESSAGE = {"role", "content", "tool_calls", "tool_call_id"}


def read_prompt(prompt: Prompt) -> str | tuple[ChatMessage, ...] | list[int]:
    """A text, a conversation, or token ids; none at all are ids.

    Raises InvalidRequestError naming what it cannot be.
    """
    if isinstance(prompt, str):
        return prompt
    items: list[Any] = list(prompt)
    if items and all(isinstance(item, ChatMessage | Mapping) for item in items):
        return tuple(map(_message, items))
    for number, item in enumerate(items):
        if isinstance(item, ChatMessage | Mapping):
            raise InvalidRequestError(
                f"item {number} of the prompt is a message, but not all are; "
                "give a text, token ids or messages"
            )
    return token_ids("prompt", items)


def goes_on(prompt: str | Sequence[ChatMessage] | Sequence[int], wanted: bool | None) -> bool:
    """Whether the reply goes on with the last message: if that is the assistant's, unless not ``wanted``.

    Raises InvalidRequestError where it is wanted and cannot be.
    """
    last = prompt[-1] if prompt and not isinstance(prompt, str) else None
    begun = isinstance(last, ChatMessage) and last.role == "assistant" and not last.tool_calls
    if wanted and not begun:
        what = f"the last is the {last.role}'s" if isinstance(last, ChatMessage) else "there is none"
        raise InvalidRequestError(
            f"continue_final_message goes on with a last message of the assistant, but {what}; "
            "leave it out, or end the conversation with what the assistant has begun to say"
        )
    return begun if wanted is None else wanted


def token_ids(name: str, values: Iterable[SupportsIndex]) -> list[int]:
    """``values`` as ints of the wire. Raises InvalidRequestError."""
    each = f"each id of {name}"
    return [whole_number(each, value) for value in values]


def _message(item: ChatMessage | Mapping[str, Any]) -> ChatMessage:
    if isinstance(item, ChatMessage):
        return item
    role, content, calls = item.get("role"), item.get("content"), item.get("tool_calls") or ()
    content = "" if content is None and calls else content
    if item.keys() - MESSAGE or not isinstance(role, str) or not isinstance(content, str):
        raise InvalidRequestError(
            "a message has a 'role' and a 'content', both of them text, 'tool_calls' or a 'tool_call_id' "
            f"where it is about them, and nothing else; this is {dict(item)!r:.200}"
        )
    return ChatMessage(
        cast(Role, role), content, read_tool_calls(calls), str(item.get("tool_call_id") or "")
    )
