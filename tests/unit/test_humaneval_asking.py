"""How problems are asked: in one request, or in two turns of a session that is ended behind them."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI

from bench.humaneval.asking import Asking, Reply
from bench.humaneval.setting import SETTINGS
from pyramidserve.errors import UnavailableError
from workers.bench.problems import Problem

PROBLEM = Problem("Toy/0", "def f():", "f", "", "")


class Server:
    """Answers with what it is given, and keeps what it was asked."""

    def __init__(self, *answers: tuple[str, str, int]) -> None:
        """``answers``: text, the reason of its end, and how many tokens were reused."""
        self._answers = list(answers)
        self.asked: list[dict[str, Any]] = []
        self.ended: list[str] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if request.method == "DELETE":
            self.ended.append(request.url.path.removeprefix("/v1/sessions/"))
            return httpx2.Response(200, json={})
        self.asked.append(json.loads(request.content))
        text, reason, reused = self._answers.pop(0)
        receipt = {"kv_keep_reached": 0.5, "reused_tokens": reused, "recalled_bytes": 7 * reused}
        choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
        usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
        return httpx2.Response(200, json={"choices": [choice], "usage": usage, "pyramidserve": receipt})

    def ask(self, setting: str) -> Reply:
        """A reply of at most eight tokens."""

        async def scenario() -> Reply:
            transport = httpx2.AsyncClient(transport=httpx2.MockTransport(self))
            async with AsyncOpenAI(
                base_url="http://toy/v1", api_key="any", http_client=transport
            ) as client:
                return await Asking(client, "toy", 8).ask(PROBLEM, SETTINGS[setting])

        return asyncio.run(scenario())

    def told(self, *names: str) -> Sequence[tuple[Any, ...]]:
        """These fields of all that was asked."""
        return [tuple(each[name] for name in names) for each in self.asked]


def test_one_request_has_no_session() -> None:
    server = Server(("\n    return 1", "stop", 0))
    assert server.ask("evict-exact") == Reply("\n    return 1", "stop", 9, 3, 0.5, 0, 0)
    assert server.told("prompt", "max_tokens", "temperature") == [("def f():", 8, 0)]
    compression = {"policy": "pyramid", "prefill": "evict", "kv_keep": 0.45, "recall": "exact"}
    assert server.told("compression", "session_id") == [(compression, None)]
    assert server.ended == []


def test_the_second_turn_goes_on_behind_the_first_token() -> None:
    server = Server(("\n", "length", 0), ("def g(): 1\n", "length", 9))
    reply = server.ask("evict-turn")
    assert server.told("prompt", "max_tokens") == [("def f():", 1), ("def f():\n", 7)]
    (session,) = {each["session_id"] for each in server.asked}
    assert server.ended == [session]
    # A stop string that begins in one turn and ends in the other counts as well.
    assert (reply.text, reply.output_tokens, reply.recalled_bytes) == ("", 6, 63)


def test_a_first_turn_that_is_the_whole_answer_has_no_second() -> None:
    server = Server(("", "stop", 0))
    assert server.ask("evict-turn").text == ""
    assert len(server.asked) == len(server.ended) == 1


def test_a_second_turn_that_finds_nothing_of_the_first_is_an_error() -> None:
    server = Server(("\n", "length", 0), ("    return 1", "stop", 0))
    with pytest.raises(UnavailableError, match="Toy/0: nothing was left of the first turn"):
        server.ask("evict-turn")
