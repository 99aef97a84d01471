"""What Prometheus is told is what receipts say."""

import asyncio
from collections import Counter
from typing import Any

import openai
import pytest
from fake_head import hello
from httpx2 import AsyncClient
from prometheus_client.parser import text_string_to_metric_families
from served_router import Site, run, site

from cluster.front.tenants import Tenant, Tenants


async def told(at: Site) -> dict[str, Counter[frozenset[str]]]:
    """Sums by the names of samples, of each combination of labels but buckets' bounds."""
    async with AsyncClient(trust_env=False) as client:
        page = await client.get(f"http://127.0.0.1:{at.server.http_ports[1]}/metrics")
    sums: dict[str, Counter[frozenset[str]]] = {}
    for family in text_string_to_metric_families(page.text):
        for sample in family.samples:
            labels = frozenset(value for name, value in sample.labels.items() if name != "le")
            sums.setdefault(sample.name, Counter())[labels] += sample.value  # type: ignore[assignment]
    return sums


def test_sums_are_those_of_the_receipts() -> None:
    async def whole() -> None:
        tenants = Tenants({"a": Tenant("a"), "b": Tenant("b")})
        async with site(queue_limit=300, tenants=tenants) as at, at.head(hello(pages=(64, 64))) as head:
            running = asyncio.create_task(head.run())
            receipts: list[tuple[str, Any]] = []

            async def ask(tenant: str, number: int) -> None:
                async with at.openai(tenant) as client:
                    reply = await client.completions.create(
                        model="toy", prompt=[1] * (1 + number % 7), max_tokens=1 + number % 20
                    )
                receipts.append((tenant, reply.model_extra["pyramidserve"]))

            await asyncio.gather(*(ask("ab"[number % 2], number) for number in range(200)))
            async with at.openai("a") as client:
                for _ in range(3):
                    with pytest.raises(openai.BadRequestError):
                        await client.completions.create(model="toy", prompt="x", temperature=-1)
            sums = await told(at)
            for tenant in "ab":
                own = [receipt for whose, receipt in receipts if whose == tenant]
                for name, field in (
                    ("prompt_tokens_total", "prompt_tokens"),
                    ("generation_tokens_total", "output_tokens"),
                    ("request_generation_tokens_sum", "output_tokens"),
                    ("cached_prompt_tokens_total", "reused_tokens"),
                ):
                    assert sums[f"pyramidserve_{name}"][frozenset([tenant])] == sum(
                        each[field] for each in own
                    ), name
                assert (
                    sums["pyramidserve_request_success_total"][frozenset([tenant, "length"])]
                    == len(own)
                    == 100
                )
                gaps = sum(each["output_tokens"] - 1 for each in own)
                assert sums["pyramidserve_inter_token_latency_seconds_count"][frozenset([tenant])] == gaps
                for name, field in (
                    ("time_to_first_token_seconds_sum", "time_to_first_token"),
                    ("request_queue_time_seconds_sum", "queue_time"),
                ):
                    seconds = sum(each[field] for each in own)
                    assert abs(sums[f"pyramidserve_{name}"][frozenset([tenant])] - seconds) < 1e-6, name
            assert sums["pyramidserve_request_failed_total"][frozenset(["a", "invalid_request"])] == 3
            assert sums["pyramidserve_num_requests_running"][frozenset()] == 0
            assert sums["pyramidserve_kv_pages"][frozenset(["p", "0", "total"])] == 64
            running.cancel()

    run(whole)
