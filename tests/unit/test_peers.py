"""The comparison with other engines: what is timed, and how runs become a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.peers.compare import by_engine, draw, table
from bench.peers.job import Job, Tell, timed


def _job(prompts: int = 3, output: int = 4) -> Job:
    return Job(
        model="",
        precision="",
        kv_precision="",
        prompts=[[1] * 20 for _ in range(prompts)],
        output=output,
        kv_bytes=10_000,
        kv_token_bytes=100,
        threads=1,
    )


def _run(engine: str, speed: float, **more: Any) -> dict[str, Any]:
    numbers = ("prefill_tokens_per_second", "decode_tokens_per_second", "ttft_p50", "inter_token_p50")
    return {
        "workload": "W1",
        "engine": engine,
        "precision": "bf16",
        "output_tokens_per_second": speed,
        **dict.fromkeys(numbers, 1.0),
        "kv_bytes": 2**20,
        "peak_rss_bytes": 2**20,
        **more,
    }


def test_kv_memory_bounds_how_many_requests_run() -> None:
    job = _job(prompts=9)
    assert job.blocks(16) == 6
    assert job.sequences(16) == 3  # 24 tokens take two blocks
    assert _job(prompts=2).sequences(16) == 2


def test_a_peer_is_timed_over_all_prompts() -> None:
    calls: list[int] = []

    def generate(prompts: Sequence[list[int]], tell: Tell) -> None:
        calls.append(len(prompts))
        for index in range(len(prompts)):
            tell(index, 1)
        for index in range(len(prompts)):
            tell(index, 3)

    result = timed(_job(), generate)
    assert calls == [1, 3]  # the first is to warm up
    assert result.output_tokens_per_second == pytest.approx(12 / result.wall_seconds)
    assert result.prefill_tokens_per_second is not None
    assert result.kv_bytes == 10_000


def test_rates_of_requests_in_waves_are_not_told() -> None:
    def generate(prompts: Sequence[list[int]], tell: Tell) -> None:
        for index in range(len(prompts)):
            for _ in range(4):
                tell(index, 1)

    result = timed(_job(), generate)
    assert result.prefill_tokens_per_second is None
    assert result.decode_tokens_per_second is None


def test_a_peer_that_ends_early_is_not_measured() -> None:
    def generate(prompts: Sequence[list[int]], tell: Tell) -> None:
        tell(0, 4)

    with pytest.raises(RuntimeError, match=r"\[4, 0, 0\] tokens, not 4 each"):
        timed(_job(), generate)


def test_the_table_has_medians_and_ratios_to_the_best_peer() -> None:
    runs = [
        *(_run("full", speed) for speed in (30.0, 50.0, 40.0)),
        _run("vllm", 20.0),
        _run("openvino", 10.0, prefill_tokens_per_second=None),
    ]
    lines = table(runs, "W1").splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in lines[4:]}
    assert list(cells) == ["openvino", "vllm", "full"]
    assert cells["full"][2:4] == ["**40.0**", "50% of 3"]
    assert [cells[name][-1] for name in cells] == ["0.50", "1.00", "2.00"]
    assert cells["openvino"][4] == ""


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    runs = [_run("full", 30.0), _run("vllm", 20.0)]
    assert list(by_engine(runs, "W1")) == ["vllm", "full"]
    draw(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
