"""What Prometheus is told of a router: the nouns, units and labels of vLLM's metrics under our own name."""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pyramidserve.types import ClusterState, Receipt

NAMESPACE = "pyramidserve"
WAITS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
LENGTHS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))


class Metrics:
    """Counts of a router's requests, by tenant, and a look at its state when they are asked for.

    Sums are those of the receipts.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._success = self._counter(
            "request_success", "Requests that ended as they should.", "finished_reason"
        )
        self._failed = self._counter("request_failed", "Calls that were refused or failed.", "reason")
        self._cancelled = self._counter("request_cancelled", "Requests whose clients went.")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._cached = self._counter("cached_prompt_tokens", "Of them, those whose KV was there.")
        self._output = self._counter("generation_tokens", "Tokens of output.")
        self._preemptions = self._counter("num_preemptions", "How often requests made room for others.")
        self._replays = self._counter("num_replays", "How often they went on on another pipeline.")
        self._kv = self._counter(
            "kv_moved_bytes", "KV that went to the host, came back, or was lost.", "how"
        )
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to a pipeline.", WAITS)
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to output.", WAITS)
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", WAITS)
        self._gaps = self._histogram("inter_token_latency_seconds", "Between output tokens.", GAPS)
        self._prompts = self._histogram("request_prompt_tokens", "Of each request.", LENGTHS)
        self._outputs = self._histogram("request_generation_tokens", "Of each request.", LENGTHS)

    def watch(self, state: Callable[[], ClusterState]) -> None:
        """Makes gauges of ``state`` whenever they are asked for."""
        self._registry.register(_Gauges(state))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def finished(self, tenant: str, receipt: Receipt, seconds: float, gaps: Sequence[float]) -> None:
        """Counts a request that ended after ``seconds``, with so long between its output tokens."""
        self._success.labels(tenant, receipt.finish_reason.value).inc()
        for counter, count in (
            (self._prompt, receipt.prompt_tokens),
            (self._cached, receipt.reused_tokens),
            (self._output, receipt.output_tokens),
            (self._preemptions, receipt.preemptions),
            (self._replays, receipt.replays),
        ):
            counter.labels(tenant).inc(count)
        moved = ("spilled", receipt.spilled_bytes), ("recalled", receipt.recalled_bytes)
        for how, count in (*moved, ("dropped", receipt.dropped_bytes)):
            self._kv.labels(tenant, how).inc(count)
        for histogram, value in (
            (self._queue, receipt.queue_time),
            (self._first, receipt.time_to_first_token),
            (self._whole, seconds),
            (self._prompts, receipt.prompt_tokens),
            (self._outputs, receipt.output_tokens),
        ):
            histogram.labels(tenant).observe(value)
        own = self._gaps.labels(tenant)
        for gap in gaps:
            own.observe(gap)

    def failed(self, tenant: str, reason: str) -> None:
        """Counts a call that ended in an error, as its caller is told."""
        self._failed.labels(tenant, reason).inc()

    def cancelled(self, tenant: str) -> None:
        """Counts a request that nobody follows any more."""
        self._cancelled.labels(tenant).inc()

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, ("tenant", *labels), namespace=NAMESPACE, registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(
            name, what, ("tenant",), namespace=NAMESPACE, registry=self._registry, buckets=buckets
        )


class _Gauges(Collector):
    def __init__(self, state: Callable[[], ClusterState]) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        """What the router looks like now."""
        state = self._state()
        stages = [(each, rank, stage) for each in state.pipelines for rank, stage in enumerate(each.stages)]
        used = [stage.pages_in_use / stage.pages_total for *_, stage in stages if stage.pages_total]
        for name, what, value in (
            ("num_requests_waiting", "Requests that wait for memory.", state.queued),
            ("num_requests_running", "Requests that run.", state.running),
            ("sessions", "Conversations that are remembered.", state.sessions),
            ("pipelines", "Attached pipelines.", len(state.pipelines)),
            (
                "kv_cache_usage_perc",
                "Share of KV pages in use on the fullest shard, 1 is all.",
                max(used, default=0),
            ),
        ):
            yield GaugeMetricFamily(f"{NAMESPACE}_{name}", what, value=value)
        pages = GaugeMetricFamily(
            f"{NAMESPACE}_kv_pages", "KV pages of a shard.", labels=("pipeline", "rank", "state")
        )
        host = GaugeMetricFamily(
            f"{NAMESPACE}_host_kv_bytes",
            "Spilled KV in a shard's host memory.",
            labels=("pipeline", "rank"),
        )
        for pipeline, rank, stage in stages:
            place = (pipeline.pipeline_id, str(rank))
            pages.add_metric((*place, "total"), stage.pages_total)
            pages.add_metric((*place, "in_use"), stage.pages_in_use)
            pages.add_metric((*place, "reserved"), stage.pages_reserved)
            host.add_metric(place, stage.host_bytes)
        yield from (pages, host)
