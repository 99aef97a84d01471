"""Freed memory is really free: more sequences fit, and the process confirms it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from toy import write_toy

from pyramidserve.types import Compression, Stopping
from workers.budget.pages import pages_for
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.policies.pyramid import PyramidKnobs

LAYERS = 12
KEEP = Compression("pyramid", "prune", kv_keep=0.45)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deep toy with a long context."""
    return write_toy(tmp_path_factory.mktemp("deep"), "long", LAYERS)


def _pool_for_full(sequences: int, tokens: int, page_bytes: int) -> int:
    """Bytes that ``sequences`` full caches of ``tokens`` tokens take; the last one is never fed."""
    return sequences * LAYERS * pages_for(tokens - 1) * page_bytes


@pytest.mark.parametrize(("prompt", "output", "times"), [(2048, 32, 1.9), (512, 128, 1.6)])
@pytest.mark.parametrize("prefill", ["prune", "evict"])
def test_a_pool_for_n_full_sequences_holds_more_compressed_ones_to_the_end(
    prompt: int, output: int, times: float, prefill: str, deep: Path
) -> None:
    full = 5
    engine = Engine(
        EngineConfig(
            checkpoint=str(deep), dtype="float32", kv_bytes=_pool_for_full(full, prompt + output, 4096)
        )
    )
    assert engine.stages[0].layout.page_bytes == 4096
    wanted = -(-int(full * times * 10) // 10)
    request = EngineRequest(
        [5 + i % 250 for i in range(prompt)],
        stopping=Stopping(output, ignore_eos=True),
        compression=Compression("pyramid", prefill, kv_keep=0.45),
    )
    for _ in range(wanted):
        engine.submit(request)
    most_decoding, finished = 0, 0
    while not engine.idle:
        finished += sum(type(event).__name__ == "SequenceFinished" for event in engine.step())
        running = engine.loop.scheduler.sequences.values()
        most_decoding = max(most_decoding, sum(bool(s.output_ids) for s in running))
        in_use = engine.stages[0].cache.device.pool.allocator
        assert in_use.pages_in_use <= in_use.pages
    assert most_decoding == finished == wanted >= times * full
    engine.check_integrity()


def test_generated_tokens_are_kept_by_the_closed_formula_at_every_step(deep: Path) -> None:
    prompt, output, knobs = 64, 2000, PyramidKnobs()
    engine = Engine(EngineConfig(checkpoint=str(deep), dtype="float32", kv_bytes=256 << 20))
    number, _ = engine.submit(
        EngineRequest(
            list(range(3, 3 + prompt)),
            stopping=Stopping(output, ignore_eos=True),
            compression=Compression("pyramid", "evict"),
        )
    )
    stage, window = engine.stages[0], 1 + int(knobs.recent_ratio * prompt)
    chunk, steps, pages = knobs.exceed_length_to_compress, 0, []
    while not engine.idle:
        engine.step()
        sequence = engine.loop.scheduler.sequences.get(number)
        if sequence is None or not sequence.output_ids:
            continue
        steps += 1
        fed = len(sequence.output_ids) - 1
        if number not in stage.cache:
            continue
        chunks = max(0, fed - window) // chunk
        generation = sequence.plan.generation
        assert generation is not None
        for layer in range(LAYERS):
            kept = sequence.plan.kept[layer] + fed - chunks * (chunk - generation.keeps[layer])
            assert stage.cache.positions(number, layer).shape[1] == kept
        pages.append(stage.cache.device.pool.allocator.pages_in_use)
    assert steps >= output - 1
    # Behind the window, every 16 tokens add the kept ones of each layer.
    assert generation is not None
    per_token = sum(generation.keeps) / chunk / 16
    assert (pages[-1] - pages[499]) / (len(pages) - 500) == pytest.approx(per_token, rel=0.05)
    assert per_token < 0.65 * LAYERS / 16


def test_device_and_host_together_hold_the_full_cache_bit_for_bit(
    toy_engine: Callable[..., Engine],
) -> None:
    prompt = list(range(3, 203))
    for policy, shards in (("pyramid", 1), ("pyramid", 2), ("snapkv", 1), ("keydiff", 2)):
        caches: list[list[torch.Tensor]] = []
        for compression in (Compression(), Compression(policy, "evict", kv_keep=0.5)):
            engine = toy_engine("gqa", shards)
            number, _ = engine.submit(
                EngineRequest(prompt, stopping=Stopping(2, ignore_eos=True), compression=compression)
            )
            engine.step()
            caches.append([])
            for stage in engine.stages:
                for layer in range(stage.layout.end - stage.layout.first):
                    positions = [torch.from_numpy(stage.cache.positions(number, layer))]
                    host = stage.cache.host.read(number, layer)
                    assert host is not None
                    positions.append(torch.from_numpy(stage.cache.host.positions(number, layer)))
                    rows = torch.cat((stage.cache.device.read(number, layer), host))
                    order = torch.cat(positions, dim=1).argsort(dim=1).expand(rows.shape[2], -1)
                    heads = zip(rows.unbind(2), order, strict=True)
                    caches[-1].append(torch.stack([own[index] for own, index in heads], dim=2))
            while not engine.idle:
                engine.step()
        for whole, split in zip(*caches, strict=True):
            assert torch.equal(whole, split)


RESIDENT = """
import sys
from pathlib import Path
import psutil
from pyramidserve.types import Compression, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest

prompt, output, sequences = 2048, 64, 8
engine = Engine(EngineConfig(sys.argv[1], dtype="float32", kv_bytes=1 << 30, host_bytes=1 << 20))
request = EngineRequest([5] * prompt, stopping=Stopping(output, ignore_eos=True),
    compression=Compression("pyramid", "prune", kv_keep=float(sys.argv[2])))
process = psutil.Process()
engine.generate([EngineRequest([5] * prompt, stopping=Stopping(1), compression=Compression())])
# The warm-up touched pages of the pool, which are used again first.
warm = prompt // 16 * engine.model.layers * engine.stages[0].layout.page_bytes
before = process.memory_info().rss
for _ in range(sequences):
    engine.submit(request)
while len([s for s in engine.loop.scheduler.sequences.values() if s.output_ids]) < sequences:
    assert not engine.idle
    engine.step()
pool = engine.stages[0].cache.device.pool
held = pool.allocator.pages_in_use * pool.page_bytes
print(held, process.memory_info().rss - before + warm)
"""


WORKSPACE = """
import sys
from pathlib import Path
import psutil
import torch
from pyramidserve.types import Compression, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.engine.choose import choose_backend
from workers.execute.workspace import decode_workspace_bytes

def grown_by(work):
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")
    work()
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before

# Three caches of 2,700 to 2,730 tokens of 4 KiB are just within what is gathered at once.
prompt, sequences = 2700, 3
sizes = {"kv_bytes": 1 << 30, "host_bytes": 1 << 20}
config = EngineConfig(sys.argv[1], dtype="float32", backend=sys.argv[2], **sizes)
engine = Engine(config)
def request(output, compression):
    return EngineRequest([5] * prompt, stopping=Stopping(output, ignore_eos=True), compression=compression)

# The warm-up touches the pages that come after it.
engine.generate([request(30, Compression())] * sequences)
for compression in (Compression(), Compression("pyramid", "prune", kv_keep=0.45)):
    replies = []
    grown = grown_by(lambda: replies.extend(engine.generate([request(1, compression)])))
    print(replies[0].receipt.peak_device_bytes.prefill_workspace, grown)
for _ in range(sequences):
    engine.submit(request(30, Compression()))
while len([s for s in engine.loop.scheduler.sequences.values() if s.output_ids]) < sequences:
    engine.step()
def decode():
    engine.step()
    engine.step()
kernels = choose_backend(sys.argv[2], torch.device("cpu"), torch.float32)
print(decode_workspace_bytes(engine.model, kernels, sequences, torch.float32), grown_by(decode))
"""


def _measured(script: str, *arguments: str | Path) -> list[tuple[int, int]]:
    """Runs ``script`` in a process of its own; the pairs of numbers that it prints."""
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        check=True,
        capture_output=True,
        text=True,
        # Large tensors go back to the system when they are freed, so that what is left is what is held.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    pairs = [line.split() for line in result.stdout.splitlines()]
    return [(int(said), int(grown)) for said, grown in pairs]


@pytest.mark.parametrize("kv_keep", [1.0, 0.45])
def test_resident_memory_confirms_what_the_pool_says(kv_keep: float, tmp_path: Path) -> None:
    checkpoint = write_toy(tmp_path / "wide-kv", "wide-kv", 12)
    ((held, grown),) = _measured(RESIDENT, checkpoint, str(kv_keep))
    assert held > 200 << 20
    assert grown == pytest.approx(held, rel=0.1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_resident_memory_confirms_the_workspace_of_steps(backend: str, tmp_path: Path) -> None:
    checkpoint = write_toy(tmp_path / "wide", "wide", 2)
    full, prune, decode = _measured(WORKSPACE, checkpoint, backend)
    for said, grown in (full, prune):
        assert said > 30 << 20
        assert grown == pytest.approx(said, rel=0.1)
    if decode[0] > 40 << 20:
        assert decode[1] == pytest.approx(decode[0], rel=0.1)
    else:  # The native kernels gather nothing.
        assert backend == "cpu"
        assert decode[1] < 8 << 20
