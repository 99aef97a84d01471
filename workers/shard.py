"""The Serve replica that hosts one shard: gang rendezvous, engine, lease, health."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from ray import serve
from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

from pyramidserve.errors import ConfigurationError
from pyramidserve.types import Compression, StageState
from workers.budget.pages import IntegrityError
from workers.device import device_of_rank
from workers.engine.loop import EngineLoop
from workers.engine.pipeline import LocalPipeline, Pipeline, pipeline_layout
from workers.engine.runner import EngineRunner, Report
from workers.engine.settings import EngineSettings
from workers.engine.stage import Stage, StageConfig, StageFacts
from workers.engine.transport import Ring, RingPipeline, follow
from workers.event_file import write_events
from workers.events import tell
from workers.head import Head
from workers.hello import first_state, hello
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import ModelConfig, read_config
from workers.model.tokenizer import Tokenizer, end_ids
from workers.policies.registry import skew
from workers.rendezvous import interface_of, meet, node_address, router_key, shard_address
from workers.schedule.capacity import capacity

logger = logging.getLogger(__name__)

GANG_TIMEOUT_SECONDS = 120.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class ShardConfig:
    """How to build a shard.

    Attributes:
        model: checkpoint, see ``resolve_checkpoint``.
        boundaries: first layers of the shards behind the first.
        compression: of requests that do not ask for any.
        host: address of the gang's own traffic; "": see ``shard_address``.
        threads: of torch, in each shard.
        stall_seconds: a step that takes longer fails the health check.
    """

    model: str
    boundaries: tuple[int, ...]
    compression: Compression
    settings: EngineSettings
    session_seconds: float
    host: str
    threads: int
    stall_seconds: float


class GangRouter(FIFOMixin, RequestRouter):
    """Sends a lease to exactly the member that it names."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return []
        pending_request.routing_context.should_backoff = True
        member = pending_request.kwargs["member"]
        return [[r] for r in candidate_replicas if r.replica_metadata.get("member") == member]


async def in_own_thread(work: Callable[[], Result]) -> Result:
    """Runs ``work`` in a thread that ends with it.

    A thread that has computed keeps its team of OpenMP threads for as long as it lives, and with more of
    these than cores libgomp lets all of them sleep at every barrier: decoding would take twice as long.
    """
    with ThreadPoolExecutor(1, "own") as thread:
        return await asyncio.get_running_loop().run_in_executor(thread, work)


@dataclass(frozen=True)
class Membership:
    """A replica's place: its gang, its rank in it, and the gang's size."""

    gang: str
    rank: int
    size: int


def _membership() -> Membership:
    context = serve.get_replica_context()
    gang = context.gang_context
    if gang is None:
        return Membership(context.replica_id.unique_id, 0, 1)
    return Membership(gang.gang_id, gang.rank, gang.world_size)


class Shard:
    """One rank of a pipeline. Rank 0 is its head: it runs the engine and talks to the router.

    Any failure of the engine ends the process, so that Serve restarts the gang whole.
    """

    async def __init__(self, config: ShardConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._config = config
        self._place = place = _membership()
        write_events(pipeline=place.gang, rank=place.rank)
        self._runner: EngineRunner | None = None
        self._head: Head | None = None
        self._leases: list[Any] = []
        self._let_go = self._leaves = self._forgotten = False
        self._tasks: list[asyncio.Task[None]] = []
        torch.set_num_threads(config.threads)
        checkpoint = await asyncio.to_thread(resolve_checkpoint, config.model)
        model = read_config(checkpoint, config.settings.max_model_len)
        stage = await in_own_thread(partial(self._load, checkpoint, model))
        facts: tuple[StageFacts, ...] = (stage.facts(node_address()),)
        ring = None
        if self._place.size > 1:
            ring = await self._join()
            facts = await asyncio.to_thread(ring.gather_facts, facts[0])
        if self._place.rank == 0:
            pipeline: Pipeline = LocalPipeline([stage]) if ring is None else RingPipeline(stage, ring)
            tokenizer = await asyncio.to_thread(Tokenizer, checkpoint)
            self._lead(pipeline, facts, model, tokenizer)
        else:
            assert ring is not None
            self._spawn(asyncio.to_thread(self._follow, stage, ring))
        layout = stage.layout
        tell(logger, logging.INFO, "shard_ready", first_layer=layout.first, end_layer=layout.end)

    def _load(self, checkpoint: Any, model: ModelConfig) -> Stage:
        bounds = (0, *self._config.boundaries, model.layers)
        rank, settings = self._place.rank, self._config.settings
        settings = replace(settings, device=device_of_rank(settings.device, rank))
        return Stage(StageConfig(checkpoint, bounds[rank], bounds[rank + 1], settings))

    async def _join(self) -> Ring:
        place, host = self._place, shard_address(self._config.host)
        # Gloo would take the address that the host's name has, which is often one of loopback.
        os.environ["GLOO_SOCKET_IFNAME"] = interface_of(host)
        store = await meet(place.gang, place.rank, place.size, host, GANG_TIMEOUT_SECONDS)
        device = torch.device(device_of_rank(self._config.settings.device, place.rank))
        return await asyncio.to_thread(Ring, store, place.rank, place.size, device)

    def _lead(
        self,
        pipeline: Pipeline,
        facts: Sequence[StageFacts],
        model: ModelConfig,
        tokenizer: Tokenizer,
    ) -> None:
        config = self._config
        layout = pipeline_layout(facts, model, config.settings)
        stages = tuple(map(first_state, facts))
        self._tell_ready(model, stages)
        sequences = config.settings.max_sequences
        for rank, fact in enumerate(facts):
            if differing := skew(facts[0].policies, fact.policies):
                raise ConfigurationError(
                    f"ranks 0 and {rank} have {differing}; install the same packages on all nodes"
                )
        introduction = hello(self._place.gang, config.model, stages, sequences, facts[0].policies)
        self._head = head = Head(introduction, router_key())
        events = asyncio.get_running_loop()

        def on_report(report: Report) -> None:
            events.call_soon_threadsafe(head.take, report)

        ends = end_ids(model, tokenizer)
        loop = EngineLoop(layout, pipeline, tokenizer, ends, config.session_seconds)
        self._runner = EngineRunner(loop, on_report, lambda error: os._exit(1))
        self._runner.start()
        self._spawn(self._serve(head))

    def _tell_ready(self, model: ModelConfig, stages: Sequence[StageState]) -> None:
        config = self._config
        fits = capacity(stages, config.settings.max_sequences, model, config.compression)
        tell(
            logger,
            logging.INFO,
            "pipeline_ready",
            model=config.model,
            layers=model.layers,
            context=model.context,
            vocabulary=model.vocabulary,
            dtype=stages[0].dtype,
            backend=stages[0].backend,
            fits=str(fits),
        )

    async def _serve(self, head: Head) -> None:
        assert self._runner is not None
        await self._hold_members()
        await head.run(self._runner)

    async def _hold_members(self) -> None:
        """Leases: peers count as busy until the head has drained, so that Serve ends the head first."""
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name).options(stream=True)
        for rank in range(1, self._place.size):
            lease: Any = handle.lease.remote(member=f"{self._place.gang}/{rank}")
            self._leases.append(lease)
            await anext(lease)

    def _follow(self, stage: Stage, ring: Ring) -> None:
        try:
            follow(stage, ring)
        except IntegrityError as error:
            tell(logger, logging.ERROR, "integrity_failed", error, what=str(error))
            os._exit(1)
        except Exception as error:
            if self._let_go:  # the head has gone in order, and Serve ends this shard next
                return
            tell(logger, logging.ERROR, "shard_failed", error)
            os._exit(1)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            tell(logger, logging.ERROR, "shard_failed", error)
            os._exit(1)

    async def lease(self, member: str) -> AsyncIterator[str]:
        """Held open by the head for as long as it needs this shard."""
        try:
            yield member
            await asyncio.Event().wait()
        finally:
            self._let_go = True

    def record_replica_metadata(self) -> dict[str, str]:
        """Lets ``GangRouter`` find this shard."""
        place = _membership()
        return {"member": f"{place.gang}/{place.rank}"}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the heads know of the router's need; see ``cluster.autoscale``."""
        return {"demand": self._head.demand} if self._head is not None else {}

    def check_health(self) -> None:
        """Raises when a step does not come back, or the shard is about to go.

        Serve asks those that it has told to go only where it has forgotten it, as when its controller died
        meanwhile: else it would count on them for ever. The first time it takes stock, and would lose the
        placement group of those that are not well.
        """
        if self._forgotten:
            raise RuntimeError("the shard has been told to go")
        self._forgotten = self._leaves
        if self._runner is not None and self._runner.stalled_for() > self._config.stall_seconds:
            raise RuntimeError(f"a step has taken more than {self._config.stall_seconds} s")

    async def __del__(self) -> None:
        self._leaves = True
        if self._head is not None:
            await self._head.leave()
        for lease in self._leases:
            lease.cancel()
        for task in self._tasks:
            task.cancel()
