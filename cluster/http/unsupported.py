"""What clients may ask for, and would not get: it is refused unless it changes nothing."""

from typing import Any

from pydantic import BaseModel

from pyramidserve.errors import InvalidRequestError

# Values that ask for nothing, beside null, false and what is empty.
HARMLESS: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "background": (),
    "bad_words": (),
    "best_of": (1,),
    "conversation": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "modalities": (["text"],),
    "previous_response_id": (),
    "prompt_logprobs": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (),
}


def refuse_unsupported(body: BaseModel) -> None:
    """Raises InvalidRequestError naming the first value that would change the answer, and cannot."""
    asked: dict[str, Any] = body.model_extra or {}
    for name in sorted(HARMLESS.keys() & asked.keys()):
        value = asked[name]
        nothing = value is None or value is False or value in ("", [], {})
        if not nothing and value not in HARMLESS[name]:
            raise InvalidRequestError(
                f"{name} is {value!r:.80}, which this does not have yet; leave it out", reason="unsupported"
            )
