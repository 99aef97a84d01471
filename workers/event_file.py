"""The file of a replica's events, beside Serve's own log of the replica."""

import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

from ray import serve

from workers import ray_private
from workers.events import write_to

SUFFIX = ".events.jsonl"


class EventFile(RotatingFileHandler):
    """Begins a new file behind the line that fills one, and so makes each line once; Python would twice."""

    def shouldRollover(self, record: logging.LogRecord) -> bool:  # noqa: N802
        """Whether the file is full."""
        return self.stream is not None and 0 < self.maxBytes <= self.stream.tell()


def write_events(**place: object) -> None:
    """Writes the events of this replica from now on, as far and as long as Serve keeps its own log.

    ``place``: what is said in each, beside the application.
    """
    own = ray_private.serve_log()
    file = Path(own.baseFilename).with_suffix(SUFFIX)
    handler = EventFile(file, maxBytes=own.maxBytes, backupCount=own.backupCount)
    application = serve.get_replica_context().app_name
    write_to(handler, logging.getLogger("ray.serve").level, application=application, **place)
