"""The file of a replica's events, beside Serve's own log of the replica."""

import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

from ray import serve

from workers import ray_private
from workers.events import write_to

SUFFIX = ".events.jsonl"


def write_events(**place: object) -> None:
    """Writes the events of this replica from now on, as far and as long as Serve keeps its own log.

    ``place``: what is said in each, beside the application.
    """
    own = ray_private.serve_log()
    file = Path(own.baseFilename).with_suffix(SUFFIX)
    handler = RotatingFileHandler(file, maxBytes=own.maxBytes, backupCount=own.backupCount)
    application = serve.get_replica_context().app_name
    write_to(handler, logging.getLogger("ray.serve").level, application=application, **place)
