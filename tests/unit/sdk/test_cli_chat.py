"""`pyramidserve chat` against a scripted server."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import grpc
import pytest
from scripted_inference import Script, ScriptedInference, echo, hold, refuse

from pyramidserve.cli import main
from pyramidserve.commands.chat import RETRIES
from pyramidserve.errors import EngineError, InvalidRequestError, OverloadedError
from pyramidserve.types import Event, FinishReason, Receipt, Sampling
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.wire import sampling_from_message

pytest_plugins = ["scripted_fixtures"]

PATIENCE = 60  # seconds that anything may take before the test fails
RECEIPT = (
    "[2 tokens, 50% of KV kept in 26% of the bytes in 16 bits (pyramid/evict), 1.5 MiB spilled, "
    "first token after 120 ms, then one in 25 ms]\n"
)


def in_turn(*scripts: Script) -> Script:
    """Follows one script a request."""
    remaining = iter(scripts)
    return lambda request, context: next(remaining)(request, context)


def roles(request: pb.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


def test_chat_answers_each_line_and_remembers(
    scripted_target: str,
    scripted: ScriptedInference,
    type_in: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    type_in("hello there\n\nand again\n/quit\nnever said\n")
    assert main(["chat", "--target", scripted_target, "--system", "be brief"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "hello there\nand again\n"
    assert printed.err == RECEIPT * 2
    assert [roles(request) for request in scripted.requests] == [
        [("system", "be brief"), ("user", "hello there")],
        [
            ("system", "be brief"),
            ("user", "hello there"),
            ("assistant", "hello there"),
            ("user", "and again"),
        ],
    ]


def test_chat_holds_one_session_and_ends_it(
    scripted_target: str, scripted: ScriptedInference, type_in: Callable[[str], None]
) -> None:
    type_in("one\ntwo\n")
    assert main(["chat", "--target", scripted_target]) == 0
    first, second = scripted.requests
    assert first.session_id == second.session_id != ""
    assert scripted.turns == {}


def test_chat_without_a_word_is_no_error(
    scripted_target: str, scripted: ScriptedInference, type_in: Callable[[str], None]
) -> None:
    type_in("")
    assert main(["chat", "--target", scripted_target]) == 0
    assert scripted.requests == []


def test_chat_sends_its_options(
    scripted_target: str, scripted: ScriptedInference, type_in: Callable[[str], None]
) -> None:
    options = "--policy pyramid --prefill evict --kv-keep 0.4 --recall turn --temperature 0.7 --top-p 0.9 "
    options += "--top-k 40 --seed -3 --max-tokens 12"
    for given in (options.split(), []):
        type_in("hello\n")
        assert main(["chat", "--target", scripted_target, *given]) == 0
    chosen, default = scripted.requests
    assert chosen.compression == pb.Compression(
        policy="pyramid", prefill="evict", kv_keep=0.4, recall="turn"
    )
    assert sampling_from_message(chosen.sampling) == Sampling(0.7, 0.9, 40, -3)
    assert chosen.stopping == pb.Stopping(max_tokens=12)
    assert default.compression == pb.Compression()
    assert default.stopping == pb.Stopping()


def said(scripted: ScriptedInference) -> list[list[str]]:
    return [[message.content for message in request.chat.messages] for request in scripted.requests]


def test_a_refused_turn_leaves_the_conversation_as_it_was(
    scripted_target: str,
    scripted: ScriptedInference,
    type_in: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    too_long = refuse(InvalidRequestError("the prompt has 900 tokens"))
    scripted.script = in_turn(too_long, echo, too_long, echo, refuse(EngineError("not a number")), echo)
    type_in("long\none\nlonger\n/drop\ntwo\nthree\nfour\n")
    assert main(["chat", "--target", scripted_target, "--system", "be brief"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "one\ntwo\nfour\n"
    assert [line for line in printed.err.splitlines() if "KV kept" not in line] == [
        "[no answer: the prompt has 900 tokens]",
        "[no answer: the prompt has 900 tokens; /drop forgets the oldest turn]",
        "[0 turns are left]",
        "[no answer: not a number]",
    ]
    system = "be brief"
    assert said(scripted) == [
        [system, "long"],
        [system, "one"],
        [system, "one", "one", "longer"],
        [system, "two"],
        [system, "two", "two", "three"],
        [system, "two", "two", "four"],
    ]


def test_an_overload_is_waited_for(
    scripted_target: str,
    scripted: ScriptedInference,
    type_in: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = refuse(OverloadedError("the queue is full", retry_delay=0.1))
    scripted.script = in_turn(full, full, echo, *[full] * (RETRIES + 1), echo)
    type_in("one\ntwo\nthree\n")
    assert main(["chat", "--target", scripted_target]) == 0
    printed = capsys.readouterr()
    assert printed.out == "one\nthree\n"
    assert printed.err.count("trying again in 0.1 s") == 2 + RETRIES
    assert printed.err.count("[no answer: the queue is full]") == 1
    assert said(scripted)[-1] == ["one", "one", "three"]


def test_a_reply_that_was_cut_says_so(
    scripted_target: str,
    scripted: ScriptedInference,
    type_in: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cut(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Event]:
        *events, end = echo(request, context)
        assert isinstance(end, Receipt)
        yield from (*events, replace(end, finish_reason=FinishReason.LENGTH))

    scripted.script = cut
    type_in("one two\n")
    assert main(["chat", "--target", scripted_target]) == 0
    assert "[cut at 2 tokens" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_ends_the_conversation(
    deaf_target: str, type_in: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    type_in("one\ntwo\n")
    assert main(["chat", "--target", deaf_target]) == 1
    assert deaf_target in capsys.readouterr().err


def test_interrupting_a_reply_keeps_the_session(scripted_target: str, scripted: ScriptedInference) -> None:
    scripted.script = in_turn(hold, echo)
    # A shell's background jobs ignore the signal, and so would their children.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pyramidserve.cli import main; raise SystemExit(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, "chat", "--target", scripted_target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("first\n")
        chat.stdin.flush()
        assert chat.stdout.read(len("held")) == "held"
        chat.send_signal(signal.SIGINT)
        assert scripted.ended.wait(PATIENCE)
        out, err = chat.communicate("second thoughts\n", PATIENCE)
    assert (chat.returncode, out) == (0, "\nsecond thoughts\n")
    assert err == "[cancelled]\n" + RECEIPT
    first, second = scripted.requests
    assert first.session_id == second.session_id
    assert roles(second) == [
        ("user", "first"),
        ("assistant", "held"),
        ("user", "second thoughts"),
    ]
