"""HumanEval's sandbox lets nothing through but what passes its test; answers are kept, and counted."""

import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench.humaneval.answers import Answer, Answers
from bench.humaneval.asking import Reply
from bench.humaneval.report import report, table
from bench.humaneval.sandbox import Sandbox, can_be_apart
from pyramidserve.errors import InvalidRequestError
from workers.bench.problems import Problem

PROBLEM = Problem(
    "Toy/0",
    "def double(n):",
    "double",
    "def check(candidate):\n    assert candidate(2) == 4\n",
    "\n    return 2 * n\n",
)
REPLY = Reply("    return 2 * n\n", "stop", 10, 6, 0.5, 0, 0)
KINDS = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(not can_be_apart(), reason="unshare is refused")),
]


@pytest.fixture(params=KINDS, ids=["hooks alone", "apart"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return Sandbox(request.param, cpu_seconds=1)


def passes(sandbox: Sandbox, body: str) -> bool:
    """Whether a function of this body passes, where its last line would."""
    lines = [*body.splitlines(), "return 2 * n"]
    return sandbox.passes(PROBLEM.program("\n" + "".join(f"    {line}\n" for line in lines)))


def test_a_right_solution_passes_and_a_wrong_one_does_not(sandbox: Sandbox) -> None:
    assert sandbox.passes(PROBLEM.program(PROBLEM.solution))
    assert not sandbox.passes(PROBLEM.program("\n    return 3 * n\n"))
    assert not sandbox.passes(PROBLEM.program("\n    return 2 *\n"))


def test_what_problems_import_is_there(sandbox: Sandbox) -> None:
    assert passes(sandbox, "import collections, functools, hashlib, itertools, math, random, re, typing")


@pytest.mark.parametrize("way", ["sys.exit(0)", "os._exit(0)", "raise SystemExit"])
def test_who_ends_before_the_test_does_has_not_passed(way: str, sandbox: Sandbox) -> None:
    assert not passes(sandbox, f"import os, sys\n{way}")


def test_an_endless_loop_is_ended_by_its_share_of_the_core(sandbox: Sandbox) -> None:
    began = time.monotonic()
    assert not passes(sandbox, "while True: pass")
    assert time.monotonic() - began < sandbox.seconds


def test_who_waits_for_ever_is_ended_by_the_clock(sandbox: Sandbox) -> None:
    assert not passes(replace(sandbox, seconds=1.0), "import time\ntime.sleep(1e6)")


def test_memory_is_bounded(sandbox: Sandbox) -> None:
    assert passes(sandbox, "held = bytearray(100 << 20)")
    assert not passes(sandbox, "held = bytearray(600 << 20)")


def test_megabytes_of_output_go_nowhere(sandbox: Sandbox) -> None:
    assert passes(sandbox, "import sys\nfor _ in range(20): print('x' * (1 << 20))\nsys.stdout.flush()")
    assert not passes(sandbox, "print('passed', flush=True)\nraise ValueError")


@pytest.mark.parametrize(
    "attempt",
    [
        "open({file!r}, 'w')",
        "open({file!r}, 'r+')",
        "os.open({file!r}, os.O_WRONLY | os.O_CREAT)",
        "os.remove({file!r})",
        "os.truncate({file!r}, 0)",
        "shutil.rmtree({folder!r})",
        "open('here', 'w')",
    ],
)
def test_files_stay_as_they_are(attempt: str, sandbox: Sandbox, tmp_path: Path) -> None:
    file = tmp_path / "kept"
    file.write_text("as it was")
    tried = attempt.format(file=str(file), folder=str(tmp_path))
    assert not passes(sandbox, f"import os, shutil\n{tried}")
    assert file.read_text() == "as it was"
    assert os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize(
    "attempt",
    ["os.fork()", "os.system('true')", "subprocess.run(['true'])"],
)
def test_there_are_no_more_processes(attempt: str, sandbox: Sandbox) -> None:
    assert not passes(sandbox, f"import os, subprocess\n{attempt}")


def test_nobody_is_called(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        place = server.getsockname()
        assert not passes(sandbox, f"import socket\nsocket.create_connection({place!r})")
        with pytest.raises(BlockingIOError):
            server.accept()


def test_answers_are_there_again_for_who_asks_the_same(tmp_path: Path) -> None:
    file, answer = tmp_path / "answers.json", Answer(REPLY, True)
    Answers(file, {"model": "toy"}).add("full", "Toy/0", answer)
    again = Answers(file, {"model": "toy"})
    assert again.of == {"full": {"Toy/0": answer}}
    again.add("full", "Toy/1", answer)
    assert list(Answers(file, {"model": "toy"}).of["full"]) == ["Toy/0", "Toy/1"]
    with pytest.raises(InvalidRequestError, match="has answers with model 'toy', here it is 'other'"):
        Answers(file, {"model": "other"})


def test_figures_are_over_the_problems_that_were_asked() -> None:
    right, wrong = (
        Answer(REPLY, True),
        Answer(replace(REPLY, text="    pass\n", kv_keep_reached=0.7), False),
    )
    names = ["Toy/0", "Toy/1"]
    full = {"Toy/0": right, "Toy/1": right, "Toy/2": wrong}
    found = report({"full": full, "evict": {"Toy/0": wrong, "Toy/1": right}}, names)
    assert found["full"]["pass_at_1"] == found["full"]["identical"] == 1
    assert found["evict"]["passed"] == ["Toy/1"]
    assert found["evict"]["others"] == ["Toy/0"]
    assert found["evict"]["kv_keep_reached"] == pytest.approx(0.6)
    assert table(found, 2).splitlines()[3] == "| evict | 50.0% (1 of 2) | 50.0% | 0.600 | 0.0 | 6 |"
    assert "identical" not in report({"evict": {"Toy/0": wrong}}, ["Toy/0"])["evict"]
