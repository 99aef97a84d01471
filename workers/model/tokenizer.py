"""Text to token ids and back."""

from collections.abc import Sequence
from pathlib import Path

from pyramidserve.errors import CheckpointError, InvalidRequestError
from pyramidserve.types import ChatMessage
from workers.model.config import ModelConfig
from workers.model.transcript import Transcript


class Tokenizer:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, checkpoint: Path) -> None:
        """Raises CheckpointError when the checkpoint has no tokenizer."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        except Exception as error:  # the tokenizers library raises just that
            raise CheckpointError(f"the tokenizer of {checkpoint} cannot be read: {error}") from error

    @property
    def end_id(self) -> int | None:
        """What ends a text, if anything does."""
        end: int | None = self._tokenizer.eos_token_id
        return end

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, with what the model wants in front."""
        ids: list[int] = self._tokenizer(text).input_ids
        return ids

    def encode_part(self, text: str) -> list[int]:
        """Ids of ``text`` as it stands, with nothing in front."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def chat(self, messages: Sequence[ChatMessage], last: Transcript | None = None) -> list[int]:
        """Ids of a conversation, up to where the assistant speaks next.

        Args:
            last: a turn; where the conversation goes on from it, its own ids come first.

        Raises InvalidRequestError when the model has no chat template or the template refuses.
        """
        going_on = last.go_on(self, messages) if last else None
        return going_on or self.encode_part(self.render(messages))

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The text that ``chat`` gives the ids of. Raises InvalidRequestError as ``chat`` does."""
        import jinja2

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (ValueError, jinja2.TemplateError) as error:
            raise InvalidRequestError(
                f"the conversation does not fit the model's chat template: {error}"
            ) from error
        return str(text)

    def decode_special(self, token: int) -> str:
        """The text of a special token; nothing of another."""
        return str(self._tokenizer.decode([token])) if token in self._tokenizer.all_special_ids else ""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


def end_ids(model: ModelConfig, tokenizer: Tokenizer) -> set[int]:
    """All that ends a reply, by the model's configurations and by the tokenizer."""
    return {*model.eos_ids, *(() if tokenizer.end_id is None else (tokenizer.end_id,))}
