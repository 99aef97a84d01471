"""What a cluster that has come up says of itself: its model, and what fits into its pipelines."""

from collections.abc import Iterator

from cluster.config import ClusterConfig
from cluster.deploy.serving import own_client
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import read_config
from workers.schedule.capacity import capacity


def introduction(config: ClusterConfig) -> Iterator[str]:
    """A line for each pipeline that is attached."""
    model = read_config(resolve_checkpoint(config.model), config.max_model_len)
    with own_client(config) as client:
        pipelines = client.cluster_state().pipelines
    for pipeline in pipelines:
        head = pipeline.stages[0]
        fits = capacity(pipeline.stages, pipeline.max_sequences, model.context, config.compression)
        yield (
            f"pipeline {pipeline.pipeline_id}: {config.model}, {model.layers} layers, "
            f"context {model.context:,}, vocabulary {model.vocabulary:,}, {head.dtype} on "
            f"{head.backend} kernels; room for {fits}"
        )
