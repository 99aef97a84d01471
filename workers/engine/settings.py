"""What the shards of an engine have and may do, from configuration to stage. Pure."""

from dataclasses import dataclass, fields

from workers.backends.tuning import ReferenceTuning
from workers.execute.tuning import ExecuteTuning
from workers.schedule.tuning import ScheduleTuning


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of each shard.

    Attributes:
        dtype: "float32", "bfloat16" or "float16"; "auto" takes bfloat16 where that is fast.
        kv_dtype: of KV, one of KV_DTYPES; "auto" is ``dtype``.
        host_kv_dtype: of KV in host memory, of as many bits or more; "auto" is as ``kv_dtype``.
        device: "cpu", "cuda", or another as torch names it.
        backend: kernels: "cpu" are compiled ones, "reference" plain torch, "auto" the fastest there are.
        max_model_len: tokens of a sequence, prompt and output, at most, or of it in the cache at once where
            its policy lets it outgrow that; 0: as many as the checkpoint's context has. Tables and
            workspace are of that size.
        kv_bytes: device memory for KV.
        host_bytes: host memory for spilled KV.
        max_sequences: sequences at once, at most.
        max_sessions: sessions at once whose KV waits for their next turn, at most.
        max_prefill_tokens: rows of a prefill micro-batch, unless one prompt alone is longer.
        policies: those of other packages that requests may ask for, by the names of their entry points.
        gates: file that `pyramidserve calibrate` has written of the model, on every node; "": what comes
            with this.
        schedule: how those that wait are weighed against those that run.
        execute: how steps are run.
        reference: how much the kernels in plain torch hold at once.
    """

    dtype: str = "auto"
    kv_dtype: str = "auto"
    host_kv_dtype: str = "auto"
    device: str = "cpu"
    backend: str = "auto"
    max_model_len: int = 0
    kv_bytes: int = 256 << 20
    host_bytes: int = 256 << 20
    max_sequences: int = 64
    max_sessions: int = 64
    max_prefill_tokens: int = 2048
    policies: tuple[str, ...] = ()
    gates: str = ""
    schedule: ScheduleTuning = ScheduleTuning()
    execute: ExecuteTuning = ExecuteTuning()
    reference: ReferenceTuning = ReferenceTuning()


def settings_of(config: EngineSettings) -> EngineSettings:
    """The settings alone of a configuration that has more."""
    return EngineSettings(**{each.name: getattr(config, each.name) for each in fields(EngineSettings)})
