"""What HTTP clients ask of the tokenizer."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

from cluster.http.asking import chat_of
from cluster.http.bodies import TokenizeBody
from pyramidserve.chat import Chat
from pyramidserve.errors import InvalidRequestError
from workers.model.transcript import Transcript


class Tokenizer(Protocol):
    """A model's, see ``workers.model.tokenizer``."""

    def encode(self, text: str) -> list[int]: ...
    def encode_part(self, text: str) -> list[int]: ...
    def chat(self, chat: Chat, last: Transcript | None = None) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def piece(self, token: int) -> bytes: ...
    def about(self) -> dict[str, Any]: ...


class Text:
    """Text to ids and back, within the model's vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def ids_of(self, body: TokenizeBody) -> list[int]:
        """The ids of what is to be tokenised. Raises InvalidRequestError."""
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("prompt or messages must be there, and not both; give one of them")
        if body.messages is not None:
            return self._tokenizer.chat(chat_of(body, body.messages))
        whole = body.add_special_tokens is not False
        prompt = cast(str, body.prompt)
        return self._tokenizer.encode(prompt) if whole else self._tokenizer.encode_part(prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, without special tokens. Raises InvalidRequestError."""
        for each in ids:
            if not 0 <= each < self._vocabulary:
                raise InvalidRequestError(
                    f"token id {each} is none of the model's; they are 0 to {self._vocabulary - 1}"
                )
        return self._tokenizer.decode(ids)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids of a prompt."""
        return self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def piece(self, token: int) -> bytes:
        """The bytes that an id stands for."""
        return self._tokenizer.piece(token)

    def about(self) -> dict[str, Any]:
        """What programs that tokenise by themselves must know."""
        return self._tokenizer.about()
