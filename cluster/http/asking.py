"""What bodies ask for, as the requests that every wire brings."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from cluster.http.bodies import (
    ChatBody,
    Choices,
    CompletionBody,
    MessageBody,
    NamedToolBody,
    Templated,
    TextPart,
)
from cluster.http.constraints import constraint_of
from cluster.http.settings import settings_of, whole_ids
from pyramidserve.chat import Chat
from pyramidserve.choices import MOST_CHOICES, choice_names, choices_of
from pyramidserve.errors import InvalidRequestError
from pyramidserve.tools import Tool, ToolCall, Tools
from pyramidserve.types import ChatMessage, Role, Stopping
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.wire import chat_to_message, stopping_to_message

# What OpenAI has where a completion says nothing; chats go on to their ends.
COMPLETION_TOKENS = 16
# Templates know of "system" what OpenAI calls "developer" now.
ROLES = {"developer": "system"}


@dataclass(frozen=True)
class Asked:
    """One choice of a request: the ``prompt``-th prompt's.

    ``salt``: of the conversations that it may go on from; None: of none.
    """

    prompt: int
    request: pb.GenerateRequest
    salt: str | None = None

    @property
    def given(self) -> int:
        """So many of the prompt's ids, the last, are scored as output."""
        return len(self.request.given_output_ids)


def asked_in_chat(body: ChatBody, name: str) -> list[Asked]:
    """A request a choice; ``name``: of all of them. Raises InvalidRequestError."""
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    chat = chat_to_message(chat_of(body, body.messages))
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError(
            f"top_logprobs is {body.top_logprobs}, which needs logprobs; set that to true, or leave it out"
        )
    logprobs = body.top_logprobs or 0 if body.logprobs else None
    return _choices(body, name, [pb.GenerateRequest(chat=chat)], limit, logprobs)


def asked_in_completion(body: CompletionBody, name: str, scored: Sequence[Sequence[int]]) -> list[Asked]:
    """As ``asked_in_chat``, for every prompt; ``scored``: the ids of each, where they are to be scored."""
    if scored:
        return _scored(body, name, scored)
    if body.score_from is not None:
        raise InvalidRequestError(
            f"score_from is {body.score_from}, which needs echo and logprobs; set them, or leave it out"
        )
    prompts = [
        pb.GenerateRequest(text=each)
        if isinstance(each, str)
        else pb.GenerateRequest(token_ids=pb.TokenIds(ids=whole_ids(each)))
        for each in prompts_of(body)
    ]
    limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return _choices(body, name, prompts, limit, body.logprobs)


def prompts_of(body: CompletionBody) -> Sequence[str | Sequence[int]]:
    """All prompts of a completion. Raises InvalidRequestError where there is none."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidRequestError("prompt is empty; give a text, token ids, or a list of these")
    return [given] if isinstance(given[0], int) else given


def chat_of(body: Templated, messages: Sequence[MessageBody]) -> Chat:
    """A conversation as ``body`` wants it. Raises InvalidRequestError."""
    if body.add_generation_prompt is False and not body.continue_final_message:
        raise InvalidRequestError(
            "add_generation_prompt is false, and a reply needs one; leave it out, or set "
            "continue_final_message"
        )
    tools = Tools(
        tuple(
            Tool(each.function.name, each.function.description or "", each.function.parameters or {})
            for each in body.tools or ()
        ),
        _choice(body.tool_choice),
        body.parallel_tool_calls is False,
    )
    return Chat.of(messages_of(messages), body.continue_final_message, tools, body.chat_template_kwargs)


def messages_of(messages: Sequence[MessageBody]) -> list[ChatMessage]:
    """A conversation, its parts joined."""
    return [
        ChatMessage(
            cast(Role, ROLES.get(each.role, each.role)),  # which role there is, is seen where it is read
            text_of(each.content),
            tuple(
                ToolCall(call.id or "", call.function.name, call.function.arguments)
                for call in each.tool_calls or ()
            ),
            each.tool_call_id or "",
        )
        for each in messages
    ]


def _choice(asked: str | NamedToolBody | None) -> str:
    return asked.function.name if isinstance(asked, NamedToolBody) else asked or "auto"


def new_name(prefix: str) -> str:
    """A name that nobody has had."""
    return f"{prefix}-{uuid.uuid4().hex}"


def text_of(content: str | Sequence[TextPart] | None) -> str:
    """What is said, its parts joined."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text or part.refusal or "" for part in content)


def _scored(body: CompletionBody, name: str, prompts: Sequence[Sequence[int]]) -> list[Asked]:
    """The prompts' first ids as prompts, and the rest as output that is given."""
    if body.score_from is None and (body.compression or body.recall):
        raise InvalidRequestError(
            "compression with echo and logprobs needs score_from, which says how much is compressed; "
            "without it the whole prompt is scored with the full cache"
        )
    more, requests = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens, []
    for prompt, ids in enumerate(prompts):
        split = body.score_from or 1
        if split > len(ids):
            raise InvalidRequestError(f"score_from is {split}, and prompt {prompt} has {len(ids)} tokens")
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=whole_ids(ids[:split])),
            given_output_ids=whole_ids(ids[split:]),
            stopping=stopping_to_message(Stopping(max_tokens=len(ids) - split + more)),
        )
        if body.score_from is None:
            request.compression.policy = "full"
        requests.append(request)
    return _choices(body, name, requests, None, body.logprobs)


def _choices(
    body: Choices,
    name: str,
    prompts: Sequence[pb.GenerateRequest],
    max_tokens: int | None,
    logprobs: int | None,
) -> list[Asked]:
    """``max_tokens``: of each choice; None: as its prompt's request says."""
    count = body.n or 1
    whole = count * len(prompts)
    if whole > MOST_CHOICES:
        raise InvalidRequestError(
            f"n is {count} and there are {len(prompts)} prompts, which are {whole} choices; "
            f"ask for at most {MOST_CHOICES} at once"
        )
    constraint = constraint_of(body.response_format, body.structured_outputs)
    settings = settings_of(body, max_tokens, constraint, logprobs)
    names, asked = choice_names(name, whole), list[Asked]()
    for prompt, request in enumerate(prompts):
        request.MergeFrom(settings)
        first, *others = choices_of(request, names[prompt * count : (prompt + 1) * count])
        # One turn is the conversation's.
        asked += [Asked(prompt, first, body.salt), *(Asked(prompt, each) for each in others)]
    return asked
