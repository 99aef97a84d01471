"""What clients send, as OpenAI's API and vLLM's additions have it.

Unknown fields are passed over, and null is as good as nothing: only what would change the answer is
refused, in ``asking.py``.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.http.constraints import FormatBody, OutputsBody
from pyramidserve.choices import MOST_CHOICES

Ids = list[int]
Knob = bool | float | str | list[float]


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=(), hide_input_in_errors=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    continuous_kv_tokens: bool | None = Field(
        None, description="ours: with each piece of a reply, how many tokens each layer has on the device"
    )


class CompressionBody(Body):
    """Ours: how the KV cache of the request is compressed; see `docs/policies.md`."""

    model_config = ConfigDict(extra="forbid")

    policy: str | None = None
    prefill: str | None = None
    kv_keep: float | None = None
    kv_bytes_keep: float | None = None
    recall: str | None = None
    parameters: dict[str, Knob] | None = None


class Shared(Body):
    """What all three kinds of requests have; what is not here is looked at in ``unsupported.py``."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_k: int | None = Field(None, description="ours and vLLM's; 0 and -1: all")
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    min_tokens: int | None = None
    include_stop_str_in_output: bool | None = None
    stop: str | list[str] | None = None
    stop_token_ids: int | Ids | None = None
    ignore_eos: bool | None = None
    compression: CompressionBody | None = None
    recall: str | None = Field(None, description="ours: short for that of `compression`")
    session_id: str | None = Field(None, description="ours: names the conversation")
    priority: Literal["high", "normal", "low"] | int | None = Field(
        None, description="ours; of a number, as vLLM has it, those below 0 go first"
    )
    deadline: Annotated[float, Field(gt=0)] | None = Field(
        None, description="ours: seconds after which nobody waits for the answer any more"
    )
    cache_salt: str | None = Field(
        None, max_length=128, description="whose conversations are looked through for one that goes on"
    )
    user: str | None = None

    @property
    def salt(self) -> str:
        return self.cache_salt or ""


class Choices(Shared):
    """What chats and completions have."""

    response_format: FormatBody | None = None
    structured_outputs: OutputsBody | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: int | None = None
    stream_options: StreamOptions | None = None
    request_id: str | None = Field(None, description="ours: one that is running is joined, not run twice")


class TextPart(Body):
    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class FunctionCallBody(Body):
    name: str
    arguments: str = ""


class CallBody(Body):
    id: str | None = None
    function: FunctionCallBody


class MessageBody(Body):
    role: str
    content: str | list[TextPart] | None = None
    tool_calls: list[CallBody] | None = None
    tool_call_id: str | None = None


class FunctionBody(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolBody(Body):
    type: Literal["function"]
    function: FunctionBody


class NamedBody(Body):
    name: str


class NamedToolBody(Body):
    """A tool that is to be called."""

    type: Literal["function"]
    function: NamedBody


class Templated(Body):
    """What chats and /tokenize have beside messages."""

    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    tools: list[ToolBody] | None = None
    tool_choice: str | NamedToolBody | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatBody(Templated, Choices):
    """POST /v1/chat/completions"""

    messages: list[MessageBody]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None


class CompletionBody(Choices):
    """POST /v1/completions"""

    prompt: str | list[str] | Ids | list[Ids]
    echo: bool | None = None
    logprobs: int | None = None
    score_from: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="ours: with `echo` and `logprobs`, tokens of the prompt that are compressed as usual; "
        "those behind are scored. Without it all but the first are, with the full cache.",
    )


class TokenizeBody(Templated):
    """POST /tokenize"""

    model: str | None = None
    prompt: str | None = None
    messages: list[MessageBody] | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: Ids
