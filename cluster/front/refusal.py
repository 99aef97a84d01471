"""What a caller is told when a call fails, on any wire."""

import logging
from collections.abc import Mapping

from cluster.route.live_requests import error_facts
from pyramidserve.errors import EngineError, PyramidServeError
from workers.events import tell

ID_CHARACTERS = 140  # in the log, of ids that may still be refused

log = logging.getLogger(__name__)


def refusal(error: Exception, call: str, ids: Mapping[str, str]) -> PyramidServeError:
    """The error that the caller of ``call`` is told; logs it. What nobody expected stays in the log."""
    about = {"call": call} | {name: value[:ID_CHARACTERS] for name, value in ids.items()}
    if isinstance(error, PyramidServeError):
        tell(log, logging.INFO, "call_refused", **about, **error_facts(error))
        return error
    tell(log, logging.ERROR, "unexpected_error", error, **about)
    return EngineError("an unexpected error; the server's log has it", reason="internal")
