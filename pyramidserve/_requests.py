"""What the blocking and the asyncio client share: building requests, assembling replies."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack
from uuid import uuid4

import grpc

from pyramidserve.chat import Chat
from pyramidserve.choices import MOST_CHOICES, choice_names, choices_of
from pyramidserve.errors import EngineError, InvalidRequestError
from pyramidserve.integers import whole_number
from pyramidserve.prompt import Prompt, goes_on, read_prompt, token_ids
from pyramidserve.tools import Tool, ToolCallPart, read_tools, whole_calls
from pyramidserve.types import (
    Compression,
    Constraint,
    Event,
    Priority,
    Receipt,
    Reply,
    Sampling,
    Stopping,
    TokenLogprob,
    Tokens,
)
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.wire import (
    chat_to_message,
    compression_to_message,
    constraint_to_message,
    error_from_rpc,
    priority_to_message,
    sampling_to_message,
    stopping_to_message,
)

DEFAULT_TARGET = "127.0.0.1:8700"


class RequestOptions(TypedDict, total=False):
    """What a request may say besides its prompt.

    Attributes:
        sampling: how the next token is drawn; greedy unless given.
        stopping: when generation ends.
        compression: how the KV cache is compressed; the deployment's default unless given, and an
            empty ``policy``, ``prefill`` or ``recall`` in it is the deployment's too.
        session_id: names a conversation whose turns should meet the same pipeline.
        request_id: unique among the live requests; random unless given. One that is already running
            is joined, not run twice.
        resume_output_ids: output ids that the caller already has, from index 0; generation
            continues behind them. Send the seed of the first ``Started`` with them.
        continue_final_message: whether the reply goes on with the last message; unless given, it does
            where that is the assistant's.
        given_output_ids: output that is given and comes back as output, with log-probabilities where
            ``sampling`` asks for them: so text is scored. Nothing ends it but ``max_tokens``.
        constraint: what the text of the reply must be.
        priority: "high" counts as having arrived 30 seconds sooner, "low" 30 seconds later.
        tools: what the reply to a conversation may call.
        tool_choice: "auto", "none", "required", or the name of the tool that it calls.
        single_tool_call: of several calls in a reply, the first alone counts.
        template_variables: that the model's chat template knows of, beside the usual ones.
    """

    sampling: Sampling
    stopping: Stopping
    compression: Compression
    session_id: str
    request_id: str
    resume_output_ids: Sequence[int]
    continue_final_message: bool | None
    given_output_ids: Sequence[int]
    constraint: Constraint | None
    priority: Priority
    tools: Sequence[Tool | Mapping[str, Any]]
    tool_choice: str
    single_tool_call: bool
    template_variables: Mapping[str, Any] | None


def generate_request(
    prompt: Prompt,
    max_message_bytes: int,
    *,
    sampling: Sampling | None = None,
    stopping: Stopping | None = None,
    compression: Compression | None = None,
    session_id: str = "",
    request_id: str | None = None,
    resume_output_ids: Sequence[int] = (),
    continue_final_message: bool | None = None,
    given_output_ids: Sequence[int] = (),
    constraint: Constraint | None = None,
    priority: Priority = "normal",
    tools: Sequence[Tool | Mapping[str, Any]] = (),
    tool_choice: str = "auto",
    single_tool_call: bool = False,
    template_variables: Mapping[str, Any] | None = None,
) -> pb.GenerateRequest:
    """The message of a request.

    Raises:
        InvalidRequestError: a value does not fit the wire, or the whole is over the limit.
    """
    try:
        request = pb.GenerateRequest(
            request_id=uuid4().hex if request_id is None else request_id,
            sampling=sampling_to_message(sampling) if sampling else None,
            stopping=stopping_to_message(stopping) if stopping else None,
            compression=compression_to_message(compression) if compression else None,
            session_id=session_id,
            resume_output_ids=token_ids("resume_output_ids", resume_output_ids),
            constraint=constraint_to_message(constraint),
            given_output_ids=token_ids("given_output_ids", given_output_ids),
            priority=priority_to_message(priority),
        )
        read = read_prompt(prompt)
        asked = read_tools(tools, tool_choice, single_tool_call)
        if isinstance(read, tuple):
            chat = Chat.of(read, continue_final_message, asked, template_variables)
            request.chat.CopyFrom(chat_to_message(chat))
        else:
            _check_alone(asked.tools, template_variables)
            _set_plain(request, read, continue_final_message)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the request cannot be put on the wire: {error}") from error
    size = request.ByteSize()
    if size > max_message_bytes:
        raise InvalidRequestError(
            f"the request has {size} bytes and the limit is {max_message_bytes}: shorten the "
            "prompt, or raise max_message_bytes here and the limit of the server",
            reason="message_too_large",
        )
    return request


def generate_requests(
    prompt: Prompt, n: int, max_message_bytes: int, **options: Unpack[RequestOptions]
) -> list[pb.GenerateRequest]:
    """The messages of ``n`` requests for replies to one prompt, as ``generate_request`` makes one.

    Raises InvalidRequestError as that does, and where there cannot be so many.
    """
    if whole_number("n", n, 1, MOST_CHOICES) > 1 and len(options.get("resume_output_ids", ())):
        raise InvalidRequestError(f"n is {n}, and resume_output_ids are of one reply; resume each alone")
    request = generate_request(prompt, max_message_bytes, **options)
    return choices_of(request, choice_names(request.request_id, n))


@dataclass(frozen=True)
class Access:
    """How a client gets in.

    Attributes:
        token: names the tenant, where the cluster wants one.
        certificate: PEM of the authority, or of the cluster itself, that TLS is to trust; None: no TLS.
    """

    token: str | None = None
    certificate: bytes | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call says."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """For TLS, if there is to be any."""
        return grpc.ssl_channel_credentials(self.certificate) if self.certificate else None


@contextmanager
def named_errors(target: str) -> Iterator[None]:
    """Turns a failed call to ``target`` into its named error."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from_rpc(error, target) from error


def assemble(events: Iterable[Event]) -> Reply:
    """The reply that ``events`` make up.

    Raises:
        EngineError: they end without a receipt.
    """
    texts: list[str] = []
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    calls: list[ToolCallPart] = []
    for event in events:
        match event:
            case Tokens():
                texts.append(event.text)
                token_ids.extend(event.token_ids)
                logprobs.extend(event.logprobs)
                calls.extend(event.tool_calls)
            case Receipt():
                return Reply("".join(texts), tuple(token_ids), event, tuple(logprobs), whole_calls(calls))
    raise EngineError("the reply ended without a receipt")


def _set_plain(request: pb.GenerateRequest, prompt: str | list[int], continues: bool | None) -> None:
    goes_on(prompt, continues)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        # An empty prompt is sent as well: which prompts are too short is for the server to say.
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(prompt)


def _check_alone(tools: Sequence[Tool], variables: Mapping[str, Any] | None) -> None:
    if tools or variables:
        what = "tools" if tools else "template_variables"
        raise InvalidRequestError(f"{what} need a conversation, which the prompt is not; give messages")
