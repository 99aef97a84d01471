"""What is said in a conversation."""

import json
from dataclasses import dataclass
from typing import Literal

from pyramidserve.tools import ToolCall

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation.

    Attributes:
        tool_calls: what the assistant has called.
        tool_call_id: which call's result a message of the role "tool" is.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""

    @property
    def said(self) -> str:
        """All that it says; equal where that is, however calls are written and named."""
        calls = [call.said for call in self.tool_calls]
        return json.dumps([self.content, calls]) if calls else self.content
