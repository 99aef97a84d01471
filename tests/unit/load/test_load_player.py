"""Sessions are played at their times, and what comes back is noted."""

import asyncio
from collections.abc import Iterator

import grpc
import pytest
from scripted_inference import ScriptedInference, receipt, refuse

from cluster.load.player import Player, Run
from cluster.load.trace import Session, Turn
from pyramidserve import AsyncClient, Compression
from pyramidserve.errors import OverloadedError
from pyramidserve.types import Event, Started, Tokens
from pyramidserve.v1 import inference_pb2 as pb

pytest_plugins = ["scripted_fixtures"]

SECONDS = 3.0
IDS = list(range(500))


def count(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Event]:
    """As many tokens as were asked for."""
    yield Started(len(request.token_ids.ids), 7)
    for index in range(request.stopping.max_tokens):
        yield Tokens(index, (index,), "x")
    yield receipt(request.request_id, request.stopping.max_tokens)


@pytest.fixture(autouse=True)
def counting(scripted: ScriptedInference) -> None:
    scripted.script = count


def play(target: str, *plan: tuple[float, Session]) -> Run:
    async def run() -> Run:
        told: list[Run] = []
        async with AsyncClient(target) as client:
            played = await Player(client, IDS, Compression("full")).play(plan, SECONDS, told.append)
        assert told
        assert all(each is played for each in told)
        return played

    return asyncio.run(run())


def test_turns_follow_each_other_with_time_to_think(
    scripted: ScriptedInference, scripted_target: str
) -> None:
    run = play(scripted_target, (0.2, Session((Turn(10, 3, 0.3), Turn(5, 2, 0.3)))))
    first, second = run.turns
    assert (first.due, first.prompt_tokens, second.prompt_tokens) == (0.2, 10, 18)
    assert first.receipt is not None
    assert first.times[0] >= first.due
    assert second.due >= first.times[-1] + 0.3
    assert run.samples[0].state.model == "tiny-llama"
    asked = scripted.requests
    assert [len(each.token_ids.ids) for each in asked] == [10, 18]
    assert list(asked[1].token_ids.ids[:10]) == list(asked[0].token_ids.ids)
    assert [each.stopping.max_tokens for each in asked] == [3, 2]
    assert asked[0].compression.policy == "full"


def test_a_refused_turn_ends_its_session_alone(scripted: ScriptedInference, scripted_target: str) -> None:
    scripted.script = refuse(OverloadedError("full", retry_delay=1.0))
    session = Session((Turn(10, 3, 0.1), Turn(5, 2, 0.1)))
    run = play(scripted_target, (0.1, session), (0.2, session))
    assert [turn.error for turn in run.turns] == ["queue_full", "queue_full"]
    assert all(turn.receipt is None for turn in run.turns)


def test_what_is_under_way_at_the_end_is_cut_off(scripted_target: str) -> None:
    run = play(scripted_target, (SECONDS + 1, Session((Turn(10, 3, 0.1),))))
    assert run.turns == []
