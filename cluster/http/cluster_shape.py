"""The state of the cluster as /v1/cluster has it."""

import dataclasses
from typing import Any

from pyramidserve.types import ClusterState


def cluster_shape(state: ClusterState) -> dict[str, Any]:
    """``state`` by the names of its fields, but for the names of tensors, which are many."""
    told = dataclasses.asdict(state)
    for pipeline in told["pipelines"]:
        for stage in pipeline["stages"]:
            del stage["tensor_names"]
    return told
