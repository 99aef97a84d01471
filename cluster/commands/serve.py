"""`pyramidserve serve`: a cluster that stays up."""

import argparse
import signal
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

from workers.events import LEVELS

SUMMARY = "keep a cluster up, on this machine or on the nodes of a Ray cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="Serve config file; default: the embedded model"
    )
    parser.add_argument(
        "--address", default="", help="of a Ray cluster to serve on; default: a new one on this machine"
    )
    parser.add_argument(
        "--log-level",
        type=str.upper,
        choices=LEVELS,
        help="show events of this level and above, a line of JSON each; the files have them in any case",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is interrupted or terminated."""
    from cluster.deploy.deployment import read_deployment
    from cluster.deploy.event_tail import events_shown
    from cluster.deploy.introduction import introduction
    from cluster.deploy.serving import ray_address, serving

    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    deployment = read_deployment(arguments.config)
    level, address = arguments.log_level, arguments.address
    with (
        events_shown(level, bool(address)) if level else nullcontext(),
        serving(deployment, address, say) as target,
    ):
        for line in introduction(deployment.config):
            say(line)
        say(f"on the Ray cluster at {ray_address()}; `pyramidserve rollout` wants that as its --address")
        say(f"serving at {target}; `pyramidserve chat --target {target}` talks to it; Ctrl-C ends it")
        stopped.wait()
    return 0


def say(message: str) -> None:
    """Tells what happens, apart from what the model says."""
    print(f"· {message}", file=sys.stderr, flush=True)
