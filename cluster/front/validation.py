"""What a client asks for, checked before anything is queued for it."""

from collections.abc import Sequence
from typing import Protocol, cast, get_args

from cluster.admit.request import ValidatedRequest
from cluster.front.size import check_size
from pyramidserve.errors import InvalidRequestError
from pyramidserve.prompt import goes_on
from pyramidserve.types import ChatMessage, Compression, Constraint, Role, Sampling
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.wire import (
    compression_from_message,
    constraint_from_message,
    priority_from_message,
    sampling_from_message,
    stopping_from_message,
)
from workers.model.config import ModelConfig
from workers.model.transcript import Transcript
from workers.schedule.validation import settle

IDENTIFIER_CHARACTERS = 128
GREEDY = Sampling()


class Grammars(Protocol):
    """What output can be held to, see ``workers.model.grammar``."""

    def check(self, constraint: Constraint, output_ids: Sequence[int] = ()) -> None:
        """Raises InvalidRequestError where there is no such grammar, or ``output_ids`` do not fit it."""
        ...


class Tokenizer(Protocol):
    """Turns what people write into token ids."""

    @property
    def characters_per_token(self) -> int | None:
        """Characters of a text that one id stands for, at most; None: any number."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` as it stands."""
        ...

    def chat(
        self, messages: Sequence[ChatMessage], last: Transcript | None = None, continues: bool | None = None
    ) -> list[int]:
        """The ids of a conversation in the model's chat template, going on from ``last`` if it does."""
        ...


def validate_request(
    message: pb.GenerateRequest,
    last: Transcript | None,
    tokenizer: Tokenizer,
    facts: ModelConfig,
    default_compression: Compression,
    grammars: Grammars,
    default_sampling: Sampling = GREEDY,
) -> ValidatedRequest:
    """Checks and completes ``message``; takes as long as tokenising its prompt does.

    Args:
        last: the last turn of its session, if that is known.

    Raises:
        InvalidRequestError: it names the value that is wrong and the way out.
    """
    _check_identifier("request_id", message.request_id, 1)
    _check_identifier("session_id", message.session_id, 0)
    check_size(message, facts.context, tokenizer.characters_per_token)
    prompt_ids, messages, continues = _prompt(message, tokenizer, last)
    sampling = sampling_from_message(message.sampling, default_sampling)
    compression = compression_from_message(message.compression, default_compression)
    resumed = tuple(message.resume_output_ids)
    given, stopping = tuple(message.given_output_ids), stopping_from_message(message.stopping)
    terms = settle(prompt_ids, sampling, stopping, compression, resumed, facts, given)
    constraint = constraint_from_message(message)
    if constraint:
        if given:
            raise InvalidRequestError("constraint holds what is drawn, and not given_output_ids; give one")
        grammars.check(constraint, resumed)
    return ValidatedRequest(
        request_id=message.request_id,
        prompt_ids=prompt_ids,
        sampling=terms.sampling,
        stopping=terms.stopping,
        compression=compression,
        session_id=message.session_id,
        resume_output_ids=resumed,
        given_output_ids=given,
        constraint=constraint,
        seed_given=sampling.seed is not None,
        limited=terms.limited,
        priority=priority_from_message(message.priority),
        messages=messages,
        continues=continues,
    )


def _check_identifier(name: str, value: str, least: int) -> None:
    if not least <= len(value) <= IDENTIFIER_CHARACTERS:
        raise InvalidRequestError(
            f"{name} {value!r:.40} has {len(value)} characters; give {least} to {IDENTIFIER_CHARACTERS}"
        )


def _prompt(
    message: pb.GenerateRequest, tokenizer: Tokenizer, last: Transcript | None
) -> tuple[tuple[int, ...], tuple[ChatMessage, ...], bool]:
    """The prompt's ids, the conversation that it is, if any, and whether the reply continues that."""
    match message.WhichOneof("prompt"):
        case "text":
            if not message.text:
                raise InvalidRequestError("text is empty; give at least one character")
            return tuple(tokenizer.encode(message.text)), (), False
        case "chat":
            messages = chat_messages(message.chat)
            given = message.chat.HasField("continue_final_message")
            continues = goes_on(messages, message.chat.continue_final_message if given else None)
            return tuple(tokenizer.chat(messages, last, continues)), messages, continues
        case "token_ids":
            return tuple(message.token_ids.ids), (), False
        case None:
            raise InvalidRequestError("the request has no prompt; set one of text, chat and token_ids")


def chat_messages(prompt: pb.ChatPrompt) -> tuple[ChatMessage, ...]:
    """A conversation of a request. Raises InvalidRequestError."""
    if not prompt.messages:
        raise InvalidRequestError("chat has 0 messages; give at least one")
    roles = get_args(Role)
    for message in prompt.messages:
        if message.role not in roles:
            raise InvalidRequestError(
                f"chat role is {message.role!r:.40}; it must be one of {', '.join(roles)}"
            )
    return tuple(ChatMessage(cast(Role, message.role), message.content) for message in prompt.messages)
