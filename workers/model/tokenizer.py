"""Text to token ids and back."""

from collections.abc import Sequence
from pathlib import Path

from pyramidserve.errors import CheckpointError, InvalidRequestError
from pyramidserve.types import ChatMessage


class Tokenizer:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, checkpoint: Path) -> None:
        """Raises CheckpointError when the checkpoint has no tokenizer."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"the tokenizer of {checkpoint} cannot be read: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, with what the model wants in front."""
        ids: list[int] = self._tokenizer(text).input_ids
        return ids

    def chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Ids of a conversation, up to where the assistant speaks next.

        Raises InvalidRequestError when the model has no chat template or the template refuses.
        """
        import jinja2

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (ValueError, jinja2.TemplateError) as error:
            raise InvalidRequestError(
                f"the conversation does not fit the model's chat template: {error}"
            ) from error
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)
