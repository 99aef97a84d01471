"""How a pipeline introduces itself to the router."""

from collections.abc import Mapping, Sequence

from pyramidserve.types import StageState
from pyramidserve.v1 import pipeline_pb2 as messages
from pyramidserve.wire import stage_state_to_message
from workers.engine.stage import StageFacts


def hello(
    pipeline_id: str,
    model: str,
    stages: Sequence[StageState],
    sequences: int,
    policies: Mapping[str, str],
) -> messages.Hello:
    """The first report of a pipeline of ``stages`` that runs at most so many ``sequences`` at once.

    ``policies``: versions by name, as all shards have them.
    """
    return messages.Hello(
        pipeline_id=pipeline_id,
        model=model,
        stages=map(stage_state_to_message, stages),
        max_sequences=sequences,
        policies=policies,
    )


def first_state(fact: StageFacts) -> StageState:
    """A shard's state before it has done anything."""
    return StageState(
        first_layer=fact.layout.first,
        end_layer=fact.layout.end,
        pid=fact.pid,
        node=fact.node,
        pages_total=fact.pages,
        pages_in_use=0,
        pages_reserved=0,
        page_bytes=fact.layout.page_bytes,
        host_bytes=0,
        host_bytes_limit=fact.host_bytes_limit,
        workspace_bytes=fact.workspace_bytes,
        resident_bytes=0,
        device_bytes=0,
        device_peak_bytes=0,
        tensor_names=fact.tensor_names,
        dtype=fact.dtype,
        backend=fact.backend,
        kv_heads=fact.layout.kv_heads,
        kv_dtype=fact.layout.kv_dtype,
        host_kv_dtype=fact.layout.host_kv_dtype,
    )
