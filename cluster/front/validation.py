"""What a client asks for, checked before anything is queued for it."""

from collections.abc import Sequence
from typing import Protocol

from cluster.admit.request import ValidatedRequest
from cluster.front.size import check_size
from pyramidserve.chat import Chat
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Constraint, Sampling
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.wire import (
    chat_from_message,
    compression_from_message,
    constraint_from_message,
    priority_from_message,
    sampling_from_message,
    stopping_from_message,
)
from workers.budget.span import Span
from workers.model.config import ModelConfig
from workers.model.transcript import Transcript
from workers.policies.registry import span_floor
from workers.schedule.validation import longest_sequence, may_outgrow, settle
from workers.tools.settle import Calling, one_of, settle_tools

IDENTIFIER_CHARACTERS = 128
GREEDY = Sampling()


class Grammars(Protocol):
    """What output can be held to, see ``workers.model.grammar``."""

    def check(self, constraint: Constraint, output_ids: Sequence[int] = ()) -> None:
        """Raises InvalidRequestError where there is no such grammar, or ``output_ids`` do not fit it."""
        ...


class Tokenizer(Calling, Protocol):
    """Turns what people write into token ids."""

    @property
    def characters_per_token(self) -> int | None:
        """Characters of a text that one id stands for, at most; None: any number."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` as it stands."""
        ...

    def chat(self, chat: Chat, last: Transcript | None = None) -> list[int]:
        """The ids of a conversation in the model's chat template, going on from ``last`` if it does."""
        ...

    def instructions(self, chat: Chat, ids: Sequence[int]) -> tuple[Span, ...]:
        """Which of the ``ids`` of a conversation give instructions, in order."""
        ...


def validate_request(
    message: pb.GenerateRequest,
    last: Transcript | None,
    tokenizer: Tokenizer,
    facts: ModelConfig,
    default_compression: Compression,
    grammars: Grammars,
    default_sampling: Sampling = GREEDY,
    kv_dtype: str = "bfloat16",
) -> ValidatedRequest:
    """Checks and completes ``message``; takes as long as tokenising its prompt does.

    Args:
        last: the last turn of its session, if that is known.
        kv_dtype: in what KV is stored, one of KV_FORMATS.

    Raises:
        InvalidRequestError: it names the value that is wrong and the way out.
    """
    _check_identifier("request_id", message.request_id, 1)
    _check_identifier("session_id", message.session_id, 0)
    compression = compression_from_message(message.compression, default_compression)
    bound = longest_sequence(facts, may_outgrow(compression, facts, kv_dtype))
    check_size(message, *bound, tokenizer.characters_per_token)
    prompt_ids, chat = _prompt(message, tokenizer, last)
    sampling = sampling_from_message(message.sampling, default_sampling)
    resumed = tuple(message.resume_output_ids)
    given, stopping = tuple(message.given_output_ids), stopping_from_message(message.stopping)
    terms = settle(prompt_ids, sampling, stopping, compression, resumed, facts, given, kv_dtype)
    floor = span_floor(terms.compression)
    syntax, held = settle_tools(chat, tokenizer) if chat else (None, None)
    constraint = one_of(constraint_from_message(message), held)
    if constraint:
        if given:
            raise InvalidRequestError("constraint holds what is drawn, and not given_output_ids; give one")
        grammars.check(constraint, resumed)
    return ValidatedRequest(
        request_id=message.request_id,
        prompt_ids=prompt_ids,
        sampling=terms.sampling,
        stopping=terms.stopping,
        compression=terms.compression,
        session_id=message.session_id,
        resume_output_ids=resumed,
        given_output_ids=given,
        constraint=constraint,
        seed_given=sampling.seed is not None,
        limited=terms.limited,
        priority=priority_from_message(message.priority),
        chat=chat,
        calls=syntax,
        instructions=tokenizer.instructions(chat, prompt_ids) if chat and floor else (),
    )


def _check_identifier(name: str, value: str, least: int) -> None:
    if not least <= len(value) <= IDENTIFIER_CHARACTERS:
        raise InvalidRequestError(
            f"{name} {value!r:.40} has {len(value)} characters; give {least} to {IDENTIFIER_CHARACTERS}"
        )


def _prompt(
    message: pb.GenerateRequest, tokenizer: Tokenizer, last: Transcript | None
) -> tuple[tuple[int, ...], Chat | None]:
    """The prompt's ids, and the conversation that it is, if any."""
    match message.WhichOneof("prompt"):
        case "text":
            if not message.text:
                raise InvalidRequestError("text is empty; give at least one character")
            return tuple(tokenizer.encode(message.text)), None
        case "chat":
            chat = chat_from_message(message.chat)
            return tuple(tokenizer.chat(chat, last)), chat
        case "token_ids":
            return tuple(message.token_ids.ids), None
        case None:
            raise InvalidRequestError("the request has no prompt; set one of text, chat and token_ids")
