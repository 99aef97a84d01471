"""`pyramidserve serve`: a cluster that stays up."""

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from workers.events import LEVELS

# As long may a `serve` that was killed take to delete what it has deployed on a Ray cluster that stays.
DELETED_SECONDS = 6.0
SUMMARY = "keep a cluster up, on this machine or on the nodes of a Ray cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="Serve config file; default: the embedded model"
    )
    parser.add_argument(
        "--address", default="", help="of a Ray cluster to serve on, or auto; default: a new one"
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
    from cluster.deploy.guardian import guarded

    deployment, level, address = read_deployment(arguments.config), arguments.log_level, arguments.address

    def work() -> int:
        from cluster.deploy.event_tail import events_shown
        from cluster.deploy.introduction import introduction
        from cluster.deploy.serving import ray_address, serving

        with (
            events_shown(level, bool(address)) if level else nullcontext(),
            serving(deployment, address, say) as target,
        ):
            for line in introduction(deployment):
                say(line)
            config = deployment.config
            tls = config.tls_certificate
            chat = f"pyramidserve chat --target {target}" + (f" --certificate {tls}" if tls else "")
            say(
                f"on the Ray cluster at {ray_address()}; `pyramidserve rollout` wants that as its --address"
            )
            if config.http_port:
                scheme, host = "https" if tls else "http", target.rpartition(":")[0]
                say(f"OpenAI's API is at {scheme}://{host}:{config.http_port}/v1")
            say(f"serving at {target}; `{chat}` talks to it; Ctrl-C ends it")
            while True:  # a signal just before a wait does not end that one
                time.sleep(1.0)

    return guarded(work, orphan_seconds=DELETED_SECONDS if address else 0.0)


def say(message: str) -> None:
    """Tells what happens, apart from what the model says."""
    print(f"· {message}", file=sys.stderr, flush=True)
