"""Whether what is said on a device is right: in fp32, on a small model with random weights."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.gpu.context import Context, free
from bench.gpu.twin import transformers_twin
from pyramidserve.types import Compression, Reply, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.engine.loop import SequenceFinished
from workers.model.checkpoint import resolve_checkpoint
from workers.schedule.tuning import ScheduleTuning

MODEL, FULL = "random:toy", Compression()
KEEP = 0.454
COMPRESSED = {
    "prune": Compression("pyramid", "prune", kv_keep=KEEP),
    "evict": Compression("pyramid", "evict", kv_keep=KEEP),
    "streaming": Compression("streaming", kv_keep=KEEP),
}
# What each head keeps of its own, and what is looked at in other ways.
OTHERS = {
    name: Compression(name, kv_keep=KEEP)
    for name in ("h2o", "scissorhands", "snapkv", "tova", "keydiff", "expected_attention")
}
# Of what is chosen by sums that each device makes in an order of its own, so much may differ.
TIES = 0.001
EXACT = replace(COMPRESSED["evict"], recall="exact")
# Streams are compared up to the first step whose two best logits are closer than this.
MARGIN = 1e-3


def tokens(context: Context, results: dict[str, Any]) -> None:
    """Each check with ``ok`` and what it counted; none stops another."""
    prompts, output = _prompts(6 if context.tiny else 20), 24 if context.tiny else 64
    engine = _engine(context.device)
    for name, check in (
        ("full is transformers", _full),
        ("compressed prompts keep what the CPU keeps", _positions),
        ("exact is full", _exact),
        ("what makes room goes on", _room),
        ("a conversation with recall", _conversation),
    ):
        try:
            results[name] = check(engine, prompts, output)
        except Exception as error:
            results[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            engine = _engine(context.device)
        context.flush()
    engine.check_integrity()
    free(context.device)
    results["ok"] = all(each["ok"] for each in results.values())


def _engine(device: torch.device, kv_bytes: int = 192 << 20) -> Engine:
    return Engine(
        EngineConfig(
            MODEL,
            dtype="float32",
            device=str(device),
            backend="reference" if device.type == "cpu" else "auto",
            kv_bytes=kv_bytes,
            host_bytes=192 << 20,
            schedule=ScheduleTuning(lifted_row=1e-9),  # what is to be compared runs, whether it pays or not
        )
    )


def _prompts(count: int) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(3, 259) for _ in range(20 + 380 * n // count)] for n in range(count)]


def _requests(
    prompts: Sequence[list[int]], output: int, compression: Compression, trace: bool = False
) -> list[EngineRequest]:
    stopping = Stopping(output, ignore_eos=True)
    return [EngineRequest(ids, stopping=stopping, compression=compression, trace=trace) for ids in prompts]


def _ids(replies: Sequence[Reply]) -> list[tuple[int, ...]]:
    return [reply.token_ids for reply in replies]


def _full(engine: Engine, prompts: list[list[int]], output: int) -> dict[str, Any]:
    (stage,) = engine.stages
    twin = transformers_twin(stage.model, engine.model, resolve_checkpoint(MODEL))
    replies = _ids(engine.generate(_requests(prompts, output, FULL)))
    equal = cut_short = 0
    for prompt, said in zip(prompts, replies, strict=True):
        whole = torch.tensor([[*prompt, *said]], device=stage.device)
        logits = twin(whole).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2)
        ties = (best.values[:, 0] - best.values[:, 1] < MARGIN).nonzero().flatten().tolist()
        certain = min(ties, default=len(said))
        cut_short += certain < len(said)
        equal += best.indices[:certain, 0].tolist() == list(said[:certain])
    return {"ok": equal == len(prompts), "prompts": len(prompts), "equal": equal, "cut_short": cut_short}


def _positions(engine: Engine, prompts: list[list[int]], output: int) -> dict[str, Any]:
    reference, found = _engine(torch.device("cpu")), {}
    for name, compression in {**COMPRESSED, **OTHERS}.items():
        requests = _requests(prompts[-4:], output, compression, trace=True)
        pairs = zip(engine.trace(requests), reference.trace(requests), strict=True)
        kept: list[list[set[tuple[int, int]]]] = [[], []]
        for both in pairs:
            # What is held in the end can be compared where the same was said.
            same = len({each.reply.token_ids for each in both}) == 1
            for own, each in zip(kept, both, strict=True):
                assert each.traced is not None
                layers = [layer for shard in each.traced.shards for layer in shard.positions]
                own += map(_pairs, [*layers, *(each.positions if same else ())])
        found[name] = {
            "positions": sum(map(len, kept[1])),
            "other": sum(len(there - here) for there, here in zip(*kept, strict=True)),
        }
    right = all(each["other"] <= TIES * each["positions"] for each in found.values())
    return {"ok": right, **found}


def _pairs(positions: npt.NDArray[np.int32]) -> set[tuple[int, int]]:
    """Sets and positions of a layer."""
    return {(number, at) for number, own in enumerate(positions.tolist()) for at in own}


def _exact(engine: Engine, prompts: list[list[int]], output: int) -> dict[str, Any]:
    full = _ids(engine.generate(_requests(prompts, output, FULL)))
    replies = engine.generate(_requests(prompts, output, EXACT))
    receipts = [reply.receipt for reply in replies]
    drafted = sum(receipt.drafted_tokens for receipt in receipts)
    return {
        "ok": _ids(replies) == full,
        "equal": sum(own == other for own, other in zip(_ids(replies), full, strict=True)),
        "prompts": len(prompts),
        "drafts_right": round(sum(receipt.accepted_tokens for receipt in receipts) / max(1, drafted), 3),
    }


def _room(engine: Engine, prompts: list[list[int]], output: int) -> dict[str, Any]:
    """In a pool for two thirds of what all come to, each says what it would have said alone."""
    (stage,) = engine.stages
    found: dict[str, Any] = {"preemptions": 0, "equal": 0, "sequences": 0}
    for compression in (FULL, *COMPRESSED.values()):
        requests = _requests([prompt[:100] for prompt in prompts[-4:]], 2 * output, compression)
        alone = [_ids(engine.generate([request]))[0] for request in requests]
        pages = 0
        for request in requests:
            engine.submit(request)
        while not engine.idle:
            engine.step()
            pages = max(pages, stage.cache.device.pool.allocator.pages_in_use)
        tight = _engine(stage.device, pages * 2 // 3 * stage.layout.page_bytes)
        numbers = [tight.submit(request)[0] for request in requests]
        for waiting in list(tight._waiting):  # whatever the forecast says
            tight.loop.admit(waiting)
        tight._waiting.clear()
        said: dict[int, list[int]] = {number: [] for number in numbers}
        while not tight.idle:
            for event in tight.step():
                if isinstance(event, SequenceFinished):
                    found["preemptions"] += event.receipt.preemptions
                elif hasattr(event, "tokens"):
                    said[event.sequence] += event.tokens.token_ids
        tight.check_integrity()
        found["sequences"] += len(requests)
        found["equal"] += sum(tuple(said[n]) == own for n, own in zip(numbers, alone, strict=True))
    return {"ok": found["equal"] == found["sequences"] and found["preemptions"] > 0, **found}


def _conversation(engine: Engine, prompts: list[list[int]], output: int) -> dict[str, Any]:
    """Turns with recall: ``exact`` says what ``full`` says, ``turn`` what the CPU says."""
    draw, reference = random.Random(2), _engine(torch.device("cpu"))
    turn, prune = (replace(COMPRESSED[name], recall="turn") for name in ("evict", "prune"))
    found: dict[str, Any] = {}
    for name, own, other, expected in (
        ("exact", EXACT, engine, FULL),
        ("turn", turn, reference, turn),
        ("prune turn", prune, reference, prune),
    ):
        ids, equal, reused = list(prompts[-1]), 0, 0
        for _ in range(3):
            request = EngineRequest(
                ids, stopping=Stopping(12, ignore_eos=True), compression=own, session_id=name
            )
            (reply,) = engine.generate([request])
            as_it_should = replace(request, compression=expected, session_id=f"expected of {name}")
            equal += _ids([reply]) == _ids(other.generate([as_it_should]))
            reused += reply.receipt.reused_tokens
            ids += [*reply.token_ids, *(draw.randrange(3, 259) for _ in range(9))]
        engine.end_session(name)
        other.end_session(f"expected of {name}")
        found[name] = {"turns": 3, "equal": equal, "reused_tokens": reused}
    return {"ok": all(each["equal"] == 3 and each["reused_tokens"] for each in found.values()), **found}
