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
import os, signal, subprocess, sys, time
from cluster.deploy.guardian import guarded

def work():
    starting = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)"
    subprocess.run([sys.executable, "-c", starting], check=True)
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

    def __init__(self, body: str, orphan_seconds: float) -> None:
        program = WORK.format(body=body, orphan_seconds=orphan_seconds)
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
        assert [each.name() for each in self.started].count("sleep") == 1

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said, once it and all that it has started are gone."""
        said, _ = self.command.communicate(timeout=30)
        _, alive = psutil.wait_procs(self.started, timeout=10)
        assert alive == []
        return self.command.returncode, said


@pytest.fixture
def running() -> Callable[..., Running]:
    def start(body: str = "while True: time.sleep(0.05)", orphan_seconds: float = 20.0) -> Running:
        return Running(body, orphan_seconds)

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


def test_the_works_death_ends_what_it_had_started(running: Callable[..., Running]) -> None:
    command = running()
    (work,) = psutil.Process(command.command.pid).children()
    assert work in command.started
    next(each for each in command.started if each.name() != "sleep").kill()
    assert command.end() == (128 + signal.SIGKILL, "")
