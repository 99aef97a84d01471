"""The state of the cluster, to and from its messages."""

from pyramidserve.types import ClusterState, PipelineState, StageState
from pyramidserve.v1 import inference_pb2 as pb


def stage_state_to_message(state: StageState) -> pb.StageState:
    """The message of ``state``."""
    return pb.StageState(**vars(state))


def stage_state_from_message(message: pb.StageState) -> StageState:
    """The state in ``message``."""
    return StageState(
        first_layer=message.first_layer,
        end_layer=message.end_layer,
        pid=message.pid,
        node=message.node,
        pages_total=message.pages_total,
        pages_in_use=message.pages_in_use,
        pages_reserved=message.pages_reserved,
        page_bytes=message.page_bytes,
        host_bytes=message.host_bytes,
        host_bytes_limit=message.host_bytes_limit,
        workspace_bytes=message.workspace_bytes,
        resident_bytes=message.resident_bytes,
        device_bytes=message.device_bytes,
        device_peak_bytes=message.device_peak_bytes,
        tensor_names=tuple(message.tensor_names),
        dtype=message.dtype,
        backend=message.backend,
        kv_heads=message.kv_heads,
        kv_dtype=message.kv_dtype,
        host_kv_dtype=message.host_kv_dtype,
    )


def pipeline_state_to_message(state: PipelineState) -> pb.PipelineState:
    """The message of ``state``."""
    return pb.PipelineState(
        pipeline_id=state.pipeline_id,
        stages=map(stage_state_to_message, state.stages),
        sequences=state.sequences,
        max_sequences=state.max_sequences,
    )


def pipeline_state_from_message(message: pb.PipelineState) -> PipelineState:
    """The state in ``message``."""
    return PipelineState(
        pipeline_id=message.pipeline_id,
        stages=tuple(map(stage_state_from_message, message.stages)),
        sequences=message.sequences,
        max_sequences=message.max_sequences,
    )


def cluster_state_to_message(state: ClusterState) -> pb.GetClusterStateResponse:
    """The message of ``state``."""
    return pb.GetClusterStateResponse(
        model=state.model,
        queued=state.queued,
        running=state.running,
        queue_limit=state.queue_limit,
        sessions=state.sessions,
        pipelines=map(pipeline_state_to_message, state.pipelines),
        decisions=state.decisions,
    )


def cluster_state_from_message(message: pb.GetClusterStateResponse) -> ClusterState:
    """The state in ``message``."""
    return ClusterState(
        model=message.model,
        queued=message.queued,
        running=message.running,
        queue_limit=message.queue_limit,
        sessions=message.sessions,
        pipelines=tuple(map(pipeline_state_from_message, message.pipelines)),
        decisions=dict(message.decisions),
    )
