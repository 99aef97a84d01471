"""The state of a cluster."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StageState:
    """One shard of a pipeline: layers ``first_layer`` up to, not including, ``end_layer``.

    ``workspace_bytes`` is what a step may need beside weights and pages, for as long as it runs;
    ``device_bytes`` is what the device's allocator has handed out, ``device_peak_bytes`` the most of it so
    far, both 0 on CPUs. ``dtype`` is of weights, ``kv_dtype`` of KV; ``backend`` has the kernels.
    ``host_kv_dtype`` is of KV in host memory; "": as on the device.
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
    host_kv_dtype: str = ""


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
