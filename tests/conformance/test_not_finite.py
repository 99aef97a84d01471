"""A sequence whose logits are not finite ends with an error; its neighbours never notice."""

import pytest
from safetensors.torch import load_file, save_file
from toy import write_toy

from pyramidserve.errors import EngineError
from pyramidserve.types import Compression, Sampling, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.engine.loop import LoopEvent, SequenceBroken, SequenceFinished, SequenceTokens

# The embedding of this token is not a number.
POISON = 77
PYRAMID = Compression("pyramid", "prune", kv_keep=0.5)
EXACT = Compression("pyramid", "evict", kv_keep=0.5, recall="exact")
STEP = Compression("pyramid", "evict", kv_keep=0.5, recall="step")
DRAWN = Sampling(0.7, seed=3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = write_toy(tmp_path_factory.mktemp("poisoned"))
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][POISON] = float("nan")
    save_file(tensors, file)
    return Engine(
        EngineConfig(checkpoint=str(folder), dtype="float32", kv_bytes=4 << 20, host_bytes=4 << 20)
    )


def run(engine: Engine, requests: list[EngineRequest]) -> list[tuple[list[int], type[LoopEvent]]]:
    """Output ids of each, and what ended it."""
    numbers = [engine.submit(request)[0] for request in requests]
    ids: dict[int, list[int]] = {number: [] for number in numbers}
    ends: dict[int, type[LoopEvent]] = {}
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, SequenceTokens):
                ids[event.sequence] += event.tokens.token_ids
            elif isinstance(event, SequenceBroken | SequenceFinished):
                ends[event.sequence] = type(event)
    engine.check_integrity()
    return [(ids[number], ends[number]) for number in numbers]


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    "compression", [Compression(), PYRAMID, STEP, EXACT], ids=["full", "prune", "step", "exact"]
)
def test_neighbours_are_not_touched(engine: Engine, compression: Compression, sampling: Sampling) -> None:
    def asked(prompt: list[int], output: tuple[int, ...] = ()) -> EngineRequest:
        stopping = Stopping(max_tokens=24, ignore_eos=True)
        return EngineRequest(prompt, sampling, stopping, compression, output, session_id=str(prompt[0]))

    sound = [asked(list(range(start, start + 40))) for start in (3, 90, 140)]
    alone = [run(engine, [each])[0] for each in sound]
    assert all(end is SequenceFinished and len(ids) == 24 for ids, end in alone)
    poisoned = [asked([200, *range(100, 130), POISON, 5]), asked([201, 5, 6], (9, POISON))]
    together = run(engine, [poisoned[0], sound[0], poisoned[1], *sound[1:]])
    assert [together[0], together[2]] == [([], SequenceBroken)] * 2
    assert [together[1], *together[3:]] == alone
    # Nor do those that come behind, on the same pages.
    assert [run(engine, [each])[0] for each in sound] == alone
    for each in sound:
        engine.end_session(each.session_id)


def test_who_runs_it_is_told(engine: Engine) -> None:
    asked = EngineRequest([POISON], stopping=Stopping(max_tokens=4))
    with pytest.raises(EngineError, match="not a number") as raised:
        engine.generate([asked, EngineRequest([5, 6], stopping=Stopping(max_tokens=4))])
    assert raised.value.reason == "not_finite"
    with pytest.raises(EngineError, match="not a number"):
        list(engine.stream(asked))
    assert engine.idle
    engine.check_integrity()
