"""What is too long for the model, told by its size alone: tokenising it would take as long as it is."""

from pyramidserve.errors import InvalidRequestError
from pyramidserve.v1 import inference_pb2 as pb


def check_size(
    message: pb.GenerateRequest, longest: int, bound: str, characters_per_token: int | None
) -> None:
    """Raises InvalidRequestError where a prompt, or output sent along, cannot fit into ``longest`` tokens.

    Args:
        bound: what ``longest`` is called.
        characters_per_token: that an id stands for at most; None: any number.
    """
    ids = len(message.token_ids.ids)
    if ids >= longest:
        raise InvalidRequestError(
            f"the prompt has {ids} tokens; {bound} is {longest}, so at most one less fits"
        )
    for name in ("resume_output_ids", "given_output_ids"):
        if (count := len(getattr(message, name))) >= longest:
            raise InvalidRequestError(f"{name} has {count} tokens; {bound} is {longest}, with the prompt")
    characters = _characters(message)
    if characters_per_token and characters > longest * characters_per_token:
        raise InvalidRequestError(
            f"the prompt has {characters} characters, which are {-(-characters // characters_per_token)} "
            f"tokens at least; {bound} is {longest}: shorten it"
        )


def _characters(message: pb.GenerateRequest) -> int:
    """Characters that become tokens, whatever a chat template makes of them."""
    if message.HasField("text"):
        return len(message.text)
    # Templates strip contents, and leave out what the assistant has thought.
    asked = (each for each in message.chat.messages if each.role in ("system", "user"))
    return sum(len(each.content.strip()) for each in asked)
