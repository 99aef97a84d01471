"""The nouns of a request and its reply, shared by clients and servers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from pyramidserve.integers import whole_number
from pyramidserve.tools import ToolCall, ToolCallPart

Role = Literal["system", "user", "assistant", "tool"]
Priority = Literal["high", "normal", "low"]
Recall = Literal["off", "turn", "step", "exact"]
# The value of a policy's knob; numbers may be one for each layer.
Parameter = bool | float | str | Sequence[float]


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation.

    Attributes:
        tool_calls: what the assistant has called.
        tool_call_id: which call's result a message of the role "tool" is.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""

    @property
    def said(self) -> str:
        """All that it says; equal where that is, however calls are written and named."""
        calls = [call.said for call in self.tool_calls]
        return json.dumps([self.content, calls]) if calls else self.content


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_p: keeps the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: keeps this many of the most likely tokens; None keeps all.
        seed: makes sampling repeatable, as the draw is a function of (seed, output index);
            None lets the server pick one.
        min_p: keeps tokens that are at least this times as likely as the likeliest, in [0, 1].
        presence_penalty: taken from the logit of what the output has, in [-2, 2].
        frequency_penalty: taken from it as often as the output has it, in [-2, 2].
        repetition_penalty: divides the logit of what prompt and output have, or multiplies one below 0.
        logit_bias: added to the logits of these ids, each in [-100, 100].
        logprobs: tells the log-probability of each output token, before anything of this changes it, and of
            so many of the likeliest in its place, at most 20; None: of none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Makes ``logit_bias`` pairs in order of their ids, so that equals are equal and have a hash.

        Raises InvalidRequestError where an id is no whole number.
        """
        biases = dict(self.logit_bias).items()
        pairs = sorted((whole_number("each id of logit_bias", token), bias) for token, bias in biases)
        object.__setattr__(self, "logit_bias", tuple(pairs))


@dataclass(frozen=True)
class Stopping:
    """When generation ends, besides the end-of-sequence token.

    Attributes:
        max_tokens: output tokens at most; None lets the server choose.
        stop: generation ends before the first of these in the text, or in what special tokens say; one text
            is taken as one.
        ignore_eos: go on after the end-of-sequence token.
        stop_token_ids: generation ends with the first of these; one id is taken as one.
        min_tokens: output tokens before which nothing of this ends it but ``max_tokens``.
        include_stop: the text has the stop string that ended it too.
    """

    max_tokens: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    include_stop: bool = False

    def __post_init__(self) -> None:
        """Makes tuples of what is given. A text is a sequence of its letters, which nobody means.

        Raises InvalidRequestError where an id is no whole number.
        """
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        ids = self.stop_token_ids
        ids = ids if isinstance(ids, Iterable) else (ids,)
        whole = tuple(whole_number("each id of stop_token_ids", each) for each in ids)
        object.__setattr__(self, "stop_token_ids", whole)


@dataclass(frozen=True)
class Constraint:
    """What the text of a reply must be, from its beginning to its end-of-sequence token.

    Attributes:
        kind: "json_schema"; "regex", in Rust's syntax; or "grammar", in Lark's as llguidance has it.
        text: the schema, the expression or the grammar; at most 65,536 characters.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Compression:
    """How the KV cache of one request is compressed.

    Attributes:
        policy: what stays on the device: "full", "local", "streaming", "pyramid", "h2o", "scissorhands",
            "snapkv", "tova", "keydiff", "expected_attention", or another deployed one.
        prefill: with "pyramid": "prune", the usual, drops hidden states as PyramidInfer does, "evict"
            computes the full prefill and spills what it evicts to host memory. "": the policy's usual.
        kv_keep: fraction of the prompt's KV, summed over layers, to leave on the device after prefill,
            in (0, 1]; excludes ``parameters`` that say how much stays.
        recall: when evicted KV comes back from host memory: "off"; "turn", when a session goes on;
            "step", also while tokens are generated; "exact", so that the reply is the full cache's.
        parameters: the policy's own knobs, by the names of its authors, obeyed exactly; and with any policy
            ``tokens`` to keep in each layer, a number or a list of one for each, in place of ``kv_keep``.
    """

    policy: str = "full"
    prefill: str = ""
    kv_keep: float | None = None
    recall: str = "off"
    parameters: Mapping[str, Parameter] | tuple[tuple[str, Parameter], ...] = ()

    def __post_init__(self) -> None:
        """Makes ``parameters`` pairs in order of their names, so that equals are equal and have a hash."""
        pairs = sorted(dict(self.parameters).items())
        values = ((name, tuple(each) if isinstance(each, list) else each) for name, each in pairs)
        object.__setattr__(self, "parameters", tuple(values))


class FinishReason(Enum):
    """Why a reply ended."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class Started:
    """A request has been accepted: tokens of its prompt, and the seed in force."""

    prompt_tokens: int
    seed: int


@dataclass(frozen=True)
class TokenLogprob:
    """How likely an output token was, as a natural logarithm, and the likeliest ones, best first."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """New output: ``token_ids`` from output index ``index`` on.

    ``text`` may lag behind the ids by an unfinished character or a possible stop string. ``logprobs``: one
    for each id, where they were asked for. ``tool_calls``: what is no text, as it calls tools.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCallPart, ...] = ()


@dataclass(frozen=True)
class DeviceBytes:
    """Device memory of one sequence by what holds it, in bytes, all shards together."""

    kv: int = 0
    scores: int = 0
    tables: int = 0
    prefill_workspace: int = 0


@dataclass(frozen=True)
class LayerReceipt:
    """Where the tokens of one layer are at the end of a reply, counted in tokens.

    ``recalled`` came back from the host during the reply, to stay on the device.
    """

    layer: int
    prompt_kept: int
    generated_kept: int
    spilled: int
    dropped: int
    recalled: int


@dataclass(frozen=True)
class Receipt:
    """What a reply took; times in seconds, memory in bytes.

    Attributes:
        policy: the policy that ran, with its prefill mode, as in "pyramid/prune".
        kv_keep_target: the fraction asked for; None where knobs or "full" ran.
        kv_keep_reached: fraction of the prompt's KV, summed over layers, on the device after prefill.
        kv_keep_bound_by: what kept the reached fraction above the target, or "".
        inter_token_p50: median time between output tokens; 0 with fewer than two.
        pipeline_id: the pipeline that served it, at the end.
        preemptions: how often it made room for others and went on later.
        replays: how often it went on on another pipeline because one was lost.
        recall: when evicted KV came back.
        host_attended_bytes: KV that attention read in host memory where it lay, every time that it did.
        reused_tokens: prompt tokens that were not computed, as an earlier turn had left their KV.
        drafted_tokens, accepted_tokens: with recall "exact", tokens that the compressed cache drafted, and
            those of them that the full cache confirmed.
        device_peak_bytes: the most that the allocators of all shards' devices had handed out by the end,
            weights, pools and whatever else ran included; 0 on CPUs.
    """

    request_id: str
    finish_reason: FinishReason
    stop_string: str
    prompt_tokens: int
    output_tokens: int
    seed: int
    policy: str
    kv_keep_target: float | None
    kv_keep_reached: float
    kv_keep_bound_by: str
    peak_device_bytes: DeviceBytes
    spilled_bytes: int
    recalled_bytes: int
    dropped_bytes: int
    queue_time: float
    time_to_first_token: float
    inter_token_p50: float
    inter_token_p99: float
    layers: tuple[LayerReceipt, ...]
    pipeline_id: str
    preemptions: int
    replays: int
    recall: str
    host_attended_bytes: int
    reused_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    device_peak_bytes: int


Event = Started | Tokens | Receipt


@dataclass(frozen=True)
class Reply:
    """A whole reply; ``logprobs`` of each id, where they were asked for."""

    text: str
    token_ids: tuple[int, ...]
    receipt: Receipt
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class StageState:
    """One shard of a pipeline: layers ``first_layer`` up to, not including, ``end_layer``.

    ``workspace_bytes`` is what a step may need beside weights and pages, for as long as it runs;
    ``device_bytes`` is what the device's allocator has handed out, ``device_peak_bytes`` the most of it so
    far, both 0 on CPUs. ``dtype`` is of weights, ``kv_dtype`` of KV; ``backend`` has the kernels.
    """

    first_layer: int
    end_layer: int
    pid: int
    node: str
    pages_total: int
    pages_in_use: int
    pages_reserved: int
    page_bytes: int
    host_bytes: int
    host_bytes_limit: int
    workspace_bytes: int
    resident_bytes: int
    device_bytes: int
    device_peak_bytes: int
    tensor_names: tuple[str, ...] = ()
    dtype: str = ""
    backend: str = ""
    kv_heads: int = 1
    kv_dtype: str = "float32"


@dataclass(frozen=True)
class PipelineState:
    """One attached pipeline; its stages in order of rank."""

    pipeline_id: str
    stages: tuple[StageState, ...]
    sequences: int
    max_sequences: int


@dataclass(frozen=True)
class ClusterState:
    """The state of the cluster as the router sees it."""

    model: str
    queued: int
    running: int
    queue_limit: int
    sessions: int
    pipelines: tuple[PipelineState, ...]
    decisions: dict[str, int] = field(default_factory=dict)
