"""The head's engine loop in a thread of its own, whose books are checked whenever it idles."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from workers.budget.pages import IntegrityError
from workers.engine.loop import EngineLoop, LoopEvent, SequenceTokens
from workers.events import tell
from workers.schedule.sequence import SequenceRequest
from workers.schedule.step import ShardMemory

logger = logging.getLogger(__name__)

EXPIRY_SECONDS = 1.0
# A first token is passed on before the next step begins: whoever does that would wait for the interpreter,
# which this thread needs to plan the step, and then for a core.
PASSING_SECONDS = 1e-4


@dataclass(frozen=True)
class SequenceRefused:
    """A sequence found no room; nothing was kept of it."""

    sequence: int


@dataclass(frozen=True)
class Start:
    """Begin these sequences; ``queued`` requests wait for room elsewhere."""

    requests: tuple[SequenceRequest, ...]
    queued: int = 0


@dataclass(frozen=True)
class Cancel:
    """End these sequences; None: all."""

    sequences: tuple[int, ...] | None


@dataclass(frozen=True)
class EndSession:
    """Give up what these sessions have left for their next turns."""

    sessions: tuple[str, ...]


Order = Start | Cancel | EndSession


@dataclass(frozen=True)
class Report:
    """What a step brought.

    ``idle``: no sequence is left. ``orders``: how many orders had been taken by then.
    """

    events: tuple[LoopEvent | SequenceRefused, ...]
    memory: tuple[ShardMemory, ...]
    idle: bool
    orders: int

    @property
    def begins(self) -> bool:
        """Whether a reply begins with it."""
        return any(isinstance(event, SequenceTokens) and not event.tokens.index for event in self.events)


class EngineRunner:
    """Feeds an engine loop from an inbox and reports every step. One other thread gives the orders."""

    def __init__(
        self,
        loop: EngineLoop,
        on_report: Callable[[Report], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """``on_report`` and ``on_failure`` are called in the engine's thread; a failure ends it."""
        self._loop = loop
        self._on_report, self._on_failure = on_report, on_failure
        self._inbox: SimpleQueue[Order] = SimpleQueue()
        self._given = self._taken = 0
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def order(self, order: Order) -> int:
        """Hands an order to the engine; returns how many there have been.

        Call it from one thread, as the count tells which orders a report knows of.
        """
        self._given += 1
        self._inbox.put(order)
        return self._given

    def stalled_for(self) -> float:
        """Seconds since the step under way began; 0 when there is none."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def _run(self) -> None:
        try:
            while True:
                self._loop.check_idle()
                events = self._take_orders()
                self._step_began = time.monotonic()
                events += self._loop.advance()
                self._step_began = None
                loop = self._loop
                report = Report(tuple(events), loop.memory, loop.idle, self._taken)
                self._on_report(report)
                if report.begins:
                    time.sleep(PASSING_SECONDS)
        except IntegrityError as error:
            tell(logger, logging.ERROR, "integrity_failed", error, what=str(error))
            self._on_failure(error)
        except BaseException as error:
            tell(logger, logging.ERROR, "engine_failed", error)
            self._on_failure(error)

    def _take_orders(self) -> list[LoopEvent | SequenceRefused]:
        """Carries out what has come in; waits for something to do when there is nothing."""
        events: list[LoopEvent | SequenceRefused] = []
        wait = self._loop.idle
        # Parked sessions expire with time.
        timeout = EXPIRY_SECONDS if self._loop.scheduler.parked else None
        while True:
            try:
                order = self._inbox.get(block=wait, timeout=timeout)
            except Empty:
                return events
            wait = False
            self._taken += 1
            events += self._carry_out(order)

    def _carry_out(self, order: Order) -> list[LoopEvent | SequenceRefused]:
        events: list[LoopEvent | SequenceRefused] = []
        match order:
            case Start(requests, queued):
                self._loop.scheduler.queued = queued
                for request in requests:
                    if not self._loop.admit(request):
                        events.append(SequenceRefused(request.sequence))
            case EndSession(sessions):
                for session_id in sessions:
                    self._loop.end_session(session_id)
            case Cancel(sequences):
                named = list(self._loop.scheduler.sequences) if sequences is None else sequences
                for sequence in named:
                    events += self._loop.cancel(sequence)
        return events
