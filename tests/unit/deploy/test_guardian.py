"""A command that is signalled or killed at any moment leaves no process behind."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

# Starts a process that leaves its family, then works until it is told to stop, which takes a moment.
WORK = """
import ctypes, os, signal, subprocess, sys, threading, time
from cluster.deploy.guardian import guarded

def work():
    starting = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)"
    subprocess.run([sys.executable, "-c", starting], check=True)
    {begin}
    try:
        print("up", flush=True)
        {body}
    except KeyboardInterrupt:
        time.sleep(0.5)
        print("in order", flush=True)
        raise
    return 7

sys.exit(guarded(work, orphan_seconds={orphan_seconds}))
"""


class Running:
    """The command under way, with the processes that it has started."""

    def __init__(self, begin: str, body: str, orphan_seconds: float) -> None:
        program = WORK.format(begin=begin, body=body, orphan_seconds=orphan_seconds)
        self.command = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        assert self.command.stdout is not None
        assert self.command.stdout.readline() == "up\n"
        self.started = psutil.Process(self.command.pid).children(recursive=True)
        self.keeper, *others = self.started
        (self.work,) = [each for each in others if each.name() == self.keeper.name()]
        assert "sleep" in [each.name() for each in others]

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said, once it and all that it has started are gone."""
        said, _ = self.command.communicate(timeout=30)
        _, alive = psutil.wait_procs(self.started, timeout=10)
        assert alive == []
        return self.command.returncode, said


@pytest.fixture
def running() -> Callable[..., Running]:
    def start(
        body: str = "while True: time.sleep(0.05)", orphan_seconds: float = 20.0, begin: str = ""
    ) -> Running:
        return Running(begin, body, orphan_seconds)

    return start


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_work_in_order(
    running: Callable[..., Running], number: signal.Signals, code: int
) -> None:
    command = running()
    command.command.send_signal(number)
    assert command.end() == (code, "in order\n")


def test_signals_while_it_stops_do_not_disturb_it(running: Callable[..., Running]) -> None:
    command = running()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        command.command.send_signal(number)
        time.sleep(0.1)  # each is a signal of its own
    assert command.end() == (143, "in order\n")


def test_what_ends_by_itself_leaves_nothing_either(running: Callable[..., Running]) -> None:
    assert running("pass").end() == (7, "")


def test_the_watchers_death_stops_the_work_in_order(running: Callable[..., Running]) -> None:
    command = running()
    command.command.kill()
    assert command.end() == (-signal.SIGKILL, "in order\n")


def test_work_without_a_watcher_that_does_not_stop_is_ended(running: Callable[..., Running]) -> None:
    stubborn = "exec('while True:\\n  try: time.sleep(0.05)\\n  except KeyboardInterrupt: pass')"
    command = running(stubborn, orphan_seconds=0.2)
    command.command.kill()
    assert command.end() == (-signal.SIGKILL, "")


def test_work_without_a_watcher_that_never_comes_back_to_the_interpreter_is_ended(
    running: Callable[..., Running],
) -> None:
    # Goes on to wait for a lock that is taken, and holds the interpreter, whatever signal comes.
    stuck = "lock, take = bytes(64), ctypes.PyDLL(None).pthread_mutex_lock; take(lock); take(lock)"
    command = running(stuck, orphan_seconds=0.2)
    command.command.kill()
    assert command.end() == (-signal.SIGKILL, "")


def test_work_without_a_watcher_that_vanishes_when_a_process_of_it_ends_leaves_nothing(
    running: Callable[..., Running],
) -> None:
    # As a driver of Ray does when its raylet ends, which has processes of its own.
    raylet = 'subprocess.Popen(["sh", "-c", "sleep 600 & echo; wait"], stdout=subprocess.PIPE)'
    vanish = "threading.Thread(target=lambda: (raylet.wait(), os._exit(1)), daemon=True).start()"
    command = running(orphan_seconds=0.0, begin=f"raylet = {raylet}; raylet.stdout.readline(); {vanish}")
    assert len(command.started) == 5
    command.command.kill()
    assert command.end()[0] == -signal.SIGKILL


def test_the_works_death_ends_what_it_had_started(running: Callable[..., Running]) -> None:
    command = running()
    command.work.kill()
    assert command.end() == (128 + signal.SIGKILL, "")


def test_the_keepers_death_ends_the_work_and_what_it_had_started(running: Callable[..., Running]) -> None:
    command = running()
    command.keeper.kill()
    assert command.end() == (128 + signal.SIGKILL, "")
