"""What a cluster that has come up says of itself: its model, and what fits into its pipelines."""

from collections.abc import Iterator

from ray import serve

from cluster.deploy.deployment import Deployment
from cluster.deploy.readiness import ANSWER_SECONDS
from pyramidserve.types import ClusterState
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import read_config
from workers.schedule.capacity import capacity


def introduction(deployment: Deployment) -> Iterator[str]:
    """A line for each pipeline that is attached."""
    config = deployment.config
    model = read_config(resolve_checkpoint(config.model), config.max_model_len)
    asked = serve.get_app_handle(deployment.name).state.remote()
    state: ClusterState = asked.result(timeout_s=ANSWER_SECONDS)
    for pipeline in state.pipelines:
        head = pipeline.stages[0]
        fits = capacity(pipeline.stages, pipeline.max_sequences, model, config.compression)
        finer = head.host_kv_dtype not in ("", head.kv_dtype)
        on_host = f" ({head.host_kv_dtype} on the host)" if finer else ""
        yield (
            f"pipeline {pipeline.pipeline_id}: {config.model}, {model.layers} layers, "
            f"context {model.context:,}, vocabulary {model.vocabulary:,}, {head.dtype} with KV in "
            f"{head.kv_dtype}{on_host} on {head.backend} kernels; room for {fits}"
        )
