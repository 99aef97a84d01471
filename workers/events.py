"""Events: what happens, as a name and facts, on Python's standard loggers. Pure.

An application with an engine in it decides where they go, as with any library; the processes of a cluster
write a line of JSON for each. No event has prompts, output or tokens in it, and none comes more often than
a few times for each request.
"""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime

PACKAGES = ("cluster", "workers")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def tell(
    log: logging.Logger, level: int, event: str, failure: BaseException | None = None, /, **facts: object
) -> None:
    """Logs an event; its traceback too where it is a ``failure``."""
    if log.isEnabledFor(level):
        text = " ".join([event, *(f"{name}={value!r}" for name, value in facts.items())])
        extra = {"event": event, "facts": facts}
        log.log(level, "%s", text, exc_info=failure, extra=extra, stacklevel=2)


class EventFormatter(logging.Formatter):
    """A line of JSON: time, level, event, where it happened, its facts, and a failure's traceback."""

    def __init__(self, place: Mapping[str, object]) -> None:
        """``place``: facts of all that happens in this process."""
        super().__init__()
        self._place = dict(place)

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "event": getattr(record, "event", record.getMessage()),
            **self._place,
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def write_to(handler: logging.Handler, level: int, **place: object) -> None:
    """Lets ``handler`` have all events of this process, of ``level`` and above, as lines of JSON."""
    handler.setFormatter(EventFormatter(place))
    for package in PACKAGES:
        log = logging.getLogger(package)
        log.setLevel(level)
        log.addHandler(handler)
