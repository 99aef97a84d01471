"""A command's work in a process of its own, so that a signal or a kill at any moment leaves nothing behind.

The process that was started watches. It takes the signals, passes the first one on as a request to stop,
and ends what is left when the work has ended, however that was. Between it and the work is a keeper, which
does the same, and which the kernel asks to stop when the watcher is killed (PR_SET_PDEATHSIG). Neither has
anything to do with Ray, whose drivers end at once, whatever Python is about to do, when their raylet does,
and whose calls may keep signals waiting. Both are told of what their descendants leave behind
(PR_SET_CHILD_SUBREAPER), so that nothing that was started gets out of reach, and nothing else is touched.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import psutil

STOP = signal.SIGUSR1  # Ray takes SIGTERM for itself, and terminals send SIGINT to whoever is there
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, STOP)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def guarded(work: Callable[[], int], orphan_seconds: float) -> int:
    """Runs ``work`` in a process of its own, in which SIGINT and SIGTERM here raise one KeyboardInterrupt.

    Call it before threads are started. It returns here and in the work's process, as `os.fork` does.

    Args:
        orphan_seconds: how long work that has lost its watcher may take to stop in order, before it is
            ended with all that it has started.

    Returns: the exit code of the work; 130 after SIGINT and 143 after SIGTERM.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    watcher = os.getpid()
    if keeper := _fork():
        return _watch(keeper)
    os.setsid()  # what a terminal sends to its processes is for the watcher alone
    if working := _fork():
        os._exit(_watch(working, watcher, orphan_seconds))
    signal.signal(STOP, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return work()


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(STOP, signal.SIG_IGN)
    raise KeyboardInterrupt


def _fork() -> int:
    """As `os.fork`. The child gets STOP when this process dies; this one adopts what the child leaves."""
    _adopt()
    parent, child = os.getpid(), os.fork()
    if not child and sys.platform == "linux":
        _prctl(PR_SET_PDEATHSIG, STOP)
        if os.getppid() != parent:
            os._exit(1)
    return child


def _watch(child: int, parent: int = 0, orphan_seconds: float = 0.0) -> int:
    """Passes on that all is to stop, and ends what is left when ``child`` has ended; returns an exit code.

    ``parent``: when that has died, all is ended after ``orphan_seconds``; 0: there is none to lose.
    """
    received, status, deadline = 0, 0, None
    # Signals stay blocked: none is lost between a look and a wait.
    while (number := _next_signal(deadline)) is not None:
        if number == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            continue
        if not received:
            os.kill(child, STOP)
        received = received or number
        if parent and deadline is None and os.getppid() != parent:
            deadline = time.monotonic() + orphan_seconds
    _end_descendants()
    if received:
        return 128 + received
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _next_signal(deadline: float | None) -> int | None:
    """Waits for one of SIGNALS; None: ``deadline`` has come."""
    if deadline is None:
        return signal.sigwait(SIGNALS)
    # Only Linux tells that a parent has died, so that there is a deadline.
    told = signal.sigtimedwait(SIGNALS, max(0.0, deadline - time.monotonic()))
    return told.si_signo if told else None


def _adopt() -> None:
    """Makes this process the parent of all descendants that lose theirs."""
    if sys.platform == "linux":
        _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _end_descendants() -> None:
    """Ends all processes that this one has started, and in turn those that lose their parents by that."""
    while left := [each for each in psutil.process_iter(["ppid"]) if each.info["ppid"] == os.getpid()]:
        for each in left:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(left, timeout=1)
