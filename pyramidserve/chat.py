"""A conversation that a reply is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyramidserve.prompt import goes_on
from pyramidserve.tools import Tools
from pyramidserve.types import ChatMessage

NO_TOOLS = Tools()


@dataclass(frozen=True)
class Chat:
    """A conversation, oldest message first.

    Attributes:
        continues: the reply goes on with the last message.
        tools: what the reply may call.
        variables: that the chat template knows of, beside the usual ones.
    """

    messages: tuple[ChatMessage, ...]
    continues: bool = False
    tools: Tools = NO_TOOLS
    variables: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        messages: Sequence[ChatMessage],
        continues: bool | None = None,
        tools: Tools = NO_TOOLS,
        variables: Mapping[str, Any] | None = None,
    ) -> "Chat":
        """``continues``: None: where the last message is the assistant's.

        Raises InvalidRequestError where it is to, and cannot.
        """
        return cls(tuple(messages), goes_on(messages, continues), tools, dict(variables or {}))
