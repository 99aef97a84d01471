"""A command's work in a process of its own, so that a signal or a kill at any moment leaves nothing behind.

The process that was started watches. It takes the signals, passes the first one on as a request to stop,
and ends what is left when the work has ended, however that was. If it is killed itself, the kernel asks
the work to stop in its place (PR_SET_PDEATHSIG). Either is told of what its descendants leave behind
(PR_SET_CHILD_SUBREAPER), so that nothing that was started gets out of reach, and nothing else is touched.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import psutil

STOP = signal.SIGUSR1  # Ray takes SIGTERM for itself, and terminals send SIGINT to whoever is there
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def guarded(work: Callable[[], int], orphan_seconds: float) -> int:
    """Runs ``work`` in a child process, in which SIGINT and SIGTERM here raise one KeyboardInterrupt.

    Call it before threads are started. It returns here and in the child, as `os.fork` does.

    Args:
        orphan_seconds: how long work that has lost its watcher may take to stop in order, before it is
            ended with all that it has started.

    Returns: the exit code of the work; 130 after SIGINT and 143 after SIGTERM.
    """
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    _adopt()
    watcher, child = os.getpid(), os.fork()
    if child:
        return _watch(child, signals)
    _obey(watcher, orphan_seconds)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    try:
        return work()
    finally:
        if os.getppid() != watcher:
            _end_descendants()


def _watch(child: int, signals: tuple[int, ...]) -> int:
    """Waits for signals, which stay blocked: none is lost between a look and a wait."""
    received: list[int] = []
    while True:
        number = signal.sigwait(signals)
        if number != signal.SIGCHLD:
            if not received:
                os.kill(child, STOP)
            received.append(number)
        else:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
    _end_descendants()
    if received:
        return 128 + received[0]
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _obey(watcher: int, orphan_seconds: float) -> None:
    os.setsid()  # what a terminal sends to its processes is for the watcher alone

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(STOP, signal.SIG_IGN)
        if os.getppid() != watcher:
            timer = threading.Timer(orphan_seconds, _end_everything)
            timer.daemon = True
            timer.start()
        raise KeyboardInterrupt

    signal.signal(STOP, stop)
    if sys.platform == "linux":
        _prctl(PR_SET_PDEATHSIG, STOP)
        if os.getppid() != watcher:
            os._exit(1)
    _adopt()


def _adopt() -> None:
    """Makes this process the parent of all descendants that lose theirs."""
    if sys.platform == "linux":
        _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _end_everything() -> None:
    _end_descendants()
    os._exit(1)


def _end_descendants() -> None:
    """Ends all processes that this one has started, and in turn those that lose their parents by that."""
    while left := [each for each in psutil.process_iter(["ppid"]) if each.info["ppid"] == os.getpid()]:
        for each in left:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(left, timeout=1)
