"""`pyramidserve state`: what the cluster is doing."""

import argparse
from collections.abc import Iterator

from pyramidserve.client import Client
from pyramidserve.commands.connection import add_connection_arguments, connection
from pyramidserve.types import ClusterState, PipelineState

SUMMARY = "print the queue, the pipelines and their memory"

_HEADINGS = (
    "pipeline",
    "sequences",
    "layers",
    "pid",
    "node",
    "pages used",
    "reserved",
    "total",
    "page KiB",
    "host MiB",
    "of",
    "workspace MiB",
    "resident MiB",
    "device MiB",
    "most",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints one snapshot."""
    with Client(**connection(arguments)) as client:
        print("\n".join(_lines(client.cluster_state())))
    return 0


def _lines(state: ClusterState) -> Iterator[str]:
    yield f"model      {state.model}"
    yield f"requests   {state.running} running, {state.queued} of {state.queue_limit} queued"
    yield f"sessions   {state.sessions}"
    for reason, count in sorted(state.decisions.items()):
        yield f"decisions  {count} {reason}"
    yield ""
    rows = [_HEADINGS, *(row for pipeline in state.pipelines for row in _rows(pipeline))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _rows(pipeline: PipelineState) -> Iterator[tuple[str, ...]]:
    """One row a shard; the pipeline's own columns only in the first."""
    own = (pipeline.pipeline_id, f"{pipeline.sequences}/{pipeline.max_sequences}")
    for stage in pipeline.stages:
        yield (
            *own,
            f"{stage.first_layer}-{stage.end_layer - 1}",
            str(stage.pid),
            stage.node,
            str(stage.pages_in_use),
            str(stage.pages_reserved),
            str(stage.pages_total),
            f"{stage.page_bytes / 2**10:.1f}",
            f"{stage.host_bytes / 2**20:.1f}",
            f"{stage.host_bytes_limit / 2**20:.1f}",
            f"{stage.workspace_bytes / 2**20:.1f}",
            f"{stage.resident_bytes / 2**20:.1f}",
            f"{stage.device_bytes / 2**20:.1f}",
            f"{stage.device_peak_bytes / 2**20:.1f}",
        )
        own = ("", "")
