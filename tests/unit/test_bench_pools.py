"""Rounds of pools are compared with what ran in the same round."""

from typing import Any

from bench.pools import compared


def run(number: int, kv_dtype: str, served: float, policy: str = "full") -> dict[str, Any]:
    return {
        "round": number,
        "pool": 2,
        "kv_dtype": kv_dtype,
        "policy": policy,
        "requests_per_second": served,
    }


def test_types_of_kv_are_compared_with_the_first_of_the_same_round_and_policy() -> None:
    results = [
        *(run(0, "auto", 1.0), run(0, "int8", 1.5), run(0, "auto", 4.0, "pyramid")),
        *(run(1, "auto", 2.0), run(1, "int8", 2.0), run(2, "auto", 1.0), run(2, "int8", 1.2)),
    ]
    assert compared(results, "auto") == [
        "pool 2, full, int8: 1.20 times the requests/s of auto at the median of 3 rounds (1.00 to 1.50)"
    ]
    assert compared(results[:1], "auto") == []
