"""`pyramidserve rollout`: new settings, code or weights in the place of what serves."""

import argparse
from pathlib import Path

from cluster.commands.serve import say

# A rollout that is killed when the old version drains is finished all the same.
SETTLED_SECONDS = 1800.0
SUMMARY = "put a new deployment in the place of one that serves, without losing a stream"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="Serve config file")
    parser.add_argument(
        "--address", default="auto", help="of the Ray cluster; default: the only one on this machine"
    )


def run(arguments: argparse.Namespace) -> int:
    """Rolls out, and returns when the old deployment has gone."""
    from cluster.deploy.deployment import read_deployment
    from cluster.deploy.guardian import guarded

    deployment = read_deployment(arguments.config)

    def work() -> int:
        from cluster.deploy.rollout import roll_out

        roll_out(deployment, arguments.address, say)
        return 0

    return guarded(work, orphan_seconds=SETTLED_SECONDS)
