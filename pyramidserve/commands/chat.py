"""`pyramidserve chat`: a conversation in the terminal."""

import argparse
import sys
import time
from contextlib import suppress
from typing import get_args
from uuid import uuid4

from pyramidserve._requests import RequestOptions
from pyramidserve.client import Client
from pyramidserve.commands.connection import add_connection_arguments, connection
from pyramidserve.errors import (
    EngineError,
    InvalidRequestError,
    OverloadedError,
    PyramidServeError,
    RequestTimeoutError,
    UnavailableError,
    UnknownSessionError,
)
from pyramidserve.types import (
    ChatMessage,
    Compression,
    FinishReason,
    Recall,
    Receipt,
    Sampling,
    Stopping,
    Tokens,
)

SUMMARY = "talk to the model"
# A turn that ends so leaves the conversation as it was.
REFUSALS = (InvalidRequestError, OverloadedError, RequestTimeoutError, EngineError)
# How often a turn is sent again while the cluster is full, and the seconds before where it names none.
RETRIES, RETRY_SECONDS = 5, 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    add_connection_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="first message of the conversation")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of a reply at most")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="SHARE")
    sampling.add_argument("--top-k", type=int, metavar="N")
    sampling.add_argument("--seed", type=int, metavar="N")
    compression = parser.add_argument_group("KV cache", "default: what the deployment says")
    compression.add_argument(
        "--policy", default="", metavar="NAME", help="full, streaming, pyramid, auto, …"
    )
    compression.add_argument("--prefill", default="", choices=("prune", "evict"))
    compression.add_argument(
        "--kv-keep", type=float, metavar="SHARE", help="of the prompt's KV to leave on the device"
    )
    compression.add_argument(
        "--kv-bytes-keep", type=float, metavar="SHARE", help="of the bytes that all its KV takes in 16 bits"
    )
    compression.add_argument("--recall", default="", choices=get_args(Recall))


def run(arguments: argparse.Namespace) -> int:
    """Answers each line of stdin until it ends or says /quit; /drop forgets the oldest turn."""
    options = RequestOptions(
        sampling=Sampling(arguments.temperature, arguments.top_p, arguments.top_k, arguments.seed),
        stopping=Stopping(arguments.max_tokens),
        compression=Compression(
            *(arguments.policy, arguments.prefill, arguments.kv_keep, arguments.recall),
            kv_bytes_keep=arguments.kv_bytes_keep,
        ),
        session_id=uuid4().hex,
    )
    system = [ChatMessage("system", arguments.system)] if arguments.system else []
    turns: list[ChatMessage] = []
    with Client(**connection(arguments)) as client:
        try:
            while (line := _next_line()) is not None:
                if line == "/drop":
                    turns = turns[2:]
                    _say(f"{len(turns) // 2} turns are left")
                    continue
                asked = [*turns, ChatMessage("user", line)]
                # An unanswered turn is forgotten: templates want user and assistant to alternate.
                if answer := _answered(client, system, asked, options):
                    turns = [*asked, ChatMessage("assistant", answer)]
        finally:
            with suppress(UnknownSessionError):
                client.end_session(options["session_id"])
    return 0


def _next_line() -> str | None:
    """The next line that says something, or None where there are no more."""
    prompt = "you> " if sys.stdin.isatty() else ""
    line = ""
    while not line:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return None
    return None if line == "/quit" else line


def _answered(
    client: Client, system: list[ChatMessage], asked: list[ChatMessage], options: RequestOptions
) -> str:
    """The answer, or "" where there is none, and why; an overload is waited for.

    Raises what is not about this turn, or happens before there was any answer.
    """
    for tries_left in reversed(range(RETRIES + 1)):
        try:
            return _answer(client, [*system, *asked], options)
        except OverloadedError as error:
            if not tries_left:
                _refused(error, asked)
            elif not _wait(error.retry_delay or RETRY_SECONDS):
                break
        except REFUSALS as error:
            _refused(error, asked)
            break
        except UnavailableError as error:
            if len(asked) == 1:
                raise
            _refused(error, asked)
            break
    return ""


def _wait(seconds: float) -> bool:
    """Waits to try again; False where Ctrl-C says not to."""
    _say(f"the cluster is full; trying again in {seconds:.1f} s")
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        _say("cancelled")
        return False
    return True


def _refused(error: PyramidServeError, asked: list[ChatMessage]) -> None:
    may_drop = isinstance(error, InvalidRequestError) and len(asked) > 1
    offer = "; /drop forgets the oldest turn" if may_drop else ""
    _say(f"no answer: {' '.join(error.message.split())}{offer}")


def _say(line: str) -> None:
    print(f"[{line}]", file=sys.stderr, flush=True)


def _answer(client: Client, messages: list[ChatMessage], options: RequestOptions) -> str:
    """Prints the reply as it comes and returns its text; Ctrl-C cancels the rest of it."""
    answer = ""
    with client.stream(messages, **options) as events:
        try:
            for event in events:
                match event:
                    case Tokens():
                        answer += event.text
                        print(event.text, end="", flush=True)
                    case Receipt():
                        print(flush=True)
                        if event.finish_reason is FinishReason.LENGTH:
                            _say(f"cut at {event.output_tokens} tokens: it may have no more")
                        _say(_summary(event))
        except KeyboardInterrupt:
            print(flush=True)
            _say("cancelled")
        except PyramidServeError:
            if answer:
                print(flush=True)
            raise
    return answer


def _summary(receipt: Receipt) -> str:
    share = receipt.kv_bytes_keep_reached  # 0 from routers that do not tell
    in_bytes = f" in {share:.0%} of the bytes in 16 bits" if share else ""
    return (
        f"{receipt.output_tokens} tokens, {receipt.kv_keep_reached:.0%} of KV kept{in_bytes} "
        f"({receipt.policy}), "
        f"{receipt.spilled_bytes / 2**20:.1f} MiB spilled, "
        f"first token after {receipt.time_to_first_token * 1000:.0f} ms, "
        f"then one in {receipt.inter_token_p50 * 1000:.0f} ms"
    )
