"""What tools make of a request, decided once when it is validated."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from pyramidserve.chat import Chat
from pyramidserve.errors import InvalidRequestError
from pyramidserve.tools import Tool
from pyramidserve.types import Constraint
from workers.tools.forced import forced_calls
from workers.tools.forms import CallForm
from workers.tools.parameters import is_text
from workers.tools.reader import CallSyntax


class Calling(Protocol):
    """How a model calls tools, see ``workers.model.tokenizer``."""

    @property
    def calls(self) -> CallForm | None:
        """The form; None: none that is known here."""
        ...

    def call_mark(self, text: str) -> str:
        """What a form calls its own, as grammars name it."""
        ...


def settle_tools(chat: Chat, model: Calling) -> tuple[CallSyntax | None, Constraint | None]:
    """How tools are called in the reply to ``chat``, and what it is held to where it must call some.

    Raises InvalidRequestError where the model's calls would not be understood, or cannot be held so.
    """
    usable = chat.tools.usable
    if not usable:
        return None, None
    if model.calls is None:
        raise InvalidRequestError(
            f"tools has {len(usable)}, and the model's chat template writes calls in a form that is not "
            "known here; leave them out, or describe them in a message"
        )
    texts = tuple(_texts(usable)) if model.calls.parameters else ()
    names = tuple(tool.name for tool in usable)
    syntax = CallSyntax(model.calls.name, names, chat.tools.single, texts)
    return syntax, forced_calls(model.calls, chat.tools, model.call_mark) if chat.tools.forced else None


def _texts(tools: Sequence[Tool]) -> Iterator[str]:
    """Parameters whose schemas say that they are texts."""
    for tool in tools:
        properties = tool.parameters.get("properties")
        for name, schema in properties.items() if isinstance(properties, Mapping) else ():
            if is_text(schema):
                yield f"{tool.name}:{name}"


def one_of(asked: Constraint | None, calls: Constraint | None) -> Constraint | None:
    """What a reply is held to. Raises InvalidRequestError where that is two things."""
    if asked and calls:
        raise InvalidRequestError(
            f"constraint is a {asked.kind}, and tool_choice asks for calls; give one of them"
        )
    return asked or calls
