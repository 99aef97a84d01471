"""What tools make of a request, decided once when it is validated."""

from typing import Protocol

from pyramidserve.chat import Chat
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Constraint
from workers.tools.forced import forced_calls
from workers.tools.forms import CallForm
from workers.tools.reader import CallSyntax


class Calling(Protocol):
    """How a model calls tools, see ``workers.model.tokenizer``."""

    @property
    def calls(self) -> CallForm | None:
        """The form; None: none that is known here."""
        ...

    def call_mark(self, text: str) -> str:
        """What opens calls, as grammars name it."""
        ...


def settle_tools(chat: Chat, model: Calling) -> tuple[CallSyntax | None, Constraint | None]:
    """How tools are called in the reply to ``chat``, and what it is held to where it must call some.

    Raises InvalidRequestError where the model's calls would not be understood.
    """
    usable = chat.tools.usable
    if not usable:
        return None, None
    if model.calls is None:
        raise InvalidRequestError(
            f"tools has {len(usable)}, and the model's chat template writes calls in a form that is not "
            "known here; leave them out, or describe them in a message"
        )
    syntax = CallSyntax(model.calls.name, tuple(tool.name for tool in usable), chat.tools.single)
    return syntax, forced_calls(model.calls, chat.tools, model.call_mark) if chat.tools.forced else None


def one_of(asked: Constraint | None, calls: Constraint | None) -> Constraint | None:
    """What a reply is held to. Raises InvalidRequestError where that is two things."""
    if asked and calls:
        raise InvalidRequestError(
            f"constraint is a {asked.kind}, and tool_choice asks for calls; give one of them"
        )
    return asked or calls
