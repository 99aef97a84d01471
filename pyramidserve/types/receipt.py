"""What a reply took."""

from dataclasses import dataclass
from enum import Enum


class FinishReason(Enum):
    """Why a reply ended."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"


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
        policy: the policy that ran, with its prefill mode, as in "pyramid/prune"; never "auto".
        kv_keep_target: the fraction asked for, or what ``kv_bytes_keep`` came to; None where knobs or
            "full" ran.
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
        kv_bytes_keep_target: the fraction of bytes asked for; None where none was.
        kv_bytes_keep_reached: bytes that the prompt took on the device after prefill, of those that all its
            KV would take in 16 bits; 0 from routers that do not tell.
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
    kv_bytes_keep_target: float | None = None
    kv_bytes_keep_reached: float = 0.0
