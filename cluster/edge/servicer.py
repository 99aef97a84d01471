"""The gRPC edge of a router."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1.health import aio as health_aio
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection

from cluster.front.front import Front
from cluster.front.refusal import refusal
from cluster.front.tenants import HEADER
from cluster.route.attached_pipeline import AttachedPipeline
from cluster.route.router import Router
from pyramidserve.errors import InvalidRequestError, PyramidServeError
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.v1 import pipeline_pb2
from pyramidserve.v1.inference_pb2_grpc import InferenceServicer
from pyramidserve.v1.pipeline_pb2_grpc import PipelineRegistryServicer
from pyramidserve.wire import cluster_state_to_message, error_to_metadata, event_to_message
from pyramidserve.wire.error import STATUS

INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
# Percent-encoded in a header that may have 8 KiB with all others; the metadata has the whole.
DETAILS_CHARACTERS = 200
Context = grpc.aio.ServicerContext[Any, Any]


@asynccontextmanager
async def refusals(
    context: Context,
    told: Callable[[Exception, str, Mapping[str, str]], PyramidServeError],
    call: str,
    **ids: str,
) -> AsyncIterator[dict[str, str]]:
    """Turns what the body raises into a status with the detail of what is ``told`` of it.

    Yields what the event says of the call, for the body to add to.
    """
    about = dict(ids)
    try:
        yield about
    except Exception as raised:
        error = told(raised, call, about)
    else:
        return
    await context.abort(
        # Errors of a deployment are for pipelines; no client can cause them.
        STATUS[type(error)],
        error.message[:DETAILS_CHARACTERS],
        error_to_metadata(error),
    )


class Inference(InferenceServicer):
    """What clients call."""

    def __init__(self, front: Front) -> None:
        self._front = front

    # A coroutine, not a generator: one that is cancelled in its write still closes its follower.
    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        async with refusals(
            context, self._front.refusal, "Generate", request_id=request.request_id
        ) as about:
            about["tenant"] = tenant = tenant_of(self._front, context)
            seconds_left = context.time_remaining()
            follower = await self._front.begin(
                tenant, request, math.inf if seconds_left is None else seconds_left
            )
            try:
                async for event in follower:
                    await context.write(event_to_message(event))
            finally:
                follower.close()

    async def EndSession(  # noqa: N802
        self, request: pb.EndSessionRequest, context: Context
    ) -> pb.EndSessionResponse:
        async with refusals(
            context, self._front.refusal, "EndSession", session_id=request.session_id
        ) as about:
            about["tenant"] = tenant = tenant_of(self._front, context)
            return pb.EndSessionResponse(turns=self._front.end_session(tenant, request.session_id))

    async def GetClusterState(  # noqa: N802
        self, request: pb.GetClusterStateRequest, context: Context
    ) -> pb.GetClusterStateResponse:
        async with refusals(context, self._front.refusal, "GetClusterState"):
            tenant_of(self._front, context)
            return cluster_state_to_message(self._front.state())


class Reflection(reflection.aio.ReflectionServicer):  # type: ignore[misc]
    """What programs call that bring no stubs of the services, as grpcurl."""

    def __init__(self, front: Front, services: Sequence[str]) -> None:
        """Tells of ``services`` by their full names, and of itself."""
        super().__init__((*services, reflection.SERVICE_NAME))
        self._front = front

    async def ServerReflectionInfo(  # noqa: N802
        self, request_iterator: AsyncIterator[Message], context: Context
    ) -> AsyncIterator[Message]:
        async with refusals(context, self._front.refusal, "ServerReflectionInfo"):
            tenant_of(self._front, context)
        async for answer in super().ServerReflectionInfo(request_iterator, context):
            yield answer


def tenant_of(front: Front, context: Context) -> str:
    """The tenant who calls. Raises UnauthenticatedError."""
    metadata: Mapping[str, str | bytes] = dict(context.invocation_metadata() or ())
    return front.identify(str(metadata.get(HEADER, "")))


class PipelineRegistry(PipelineRegistryServicer):
    """What the heads of pipelines call."""

    def __init__(self, router: Router, health: health_aio.HealthServicer) -> None:
        self._router = router
        self._health = health

    async def Attach(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[pipeline_pb2.PipelineReport], context: Context
    ) -> None:
        async with refusals(context, refusal, "Attach"):
            first = await anext(request_iterator, pipeline_pb2.PipelineReport())
            if not first.HasField("hello"):
                raise InvalidRequestError("the first report is not Hello; introduce the pipeline")
            pipeline = self._router.attach(first.hello)
            try:
                await self.publish_health()
                # The head's sign that it is attached: there may be no order for long.
                await context.send_initial_metadata(())
                await self._converse(pipeline, request_iterator, context)
            finally:
                self._router.detach(pipeline)
                await self.publish_health()

    async def publish_health(self) -> None:
        """Makes the health of the inference service that of the router."""
        status = HealthCheckResponse.SERVING
        if not self._router.serving:
            status = HealthCheckResponse.NOT_SERVING
        await self._health.set(INFERENCE, status)

    async def _converse(
        self,
        pipeline: AttachedPipeline,
        reports: AsyncIterator[pipeline_pb2.PipelineReport],
        context: Context,
    ) -> None:
        """Reads reports and writes orders until either ends."""
        both = [
            asyncio.create_task(self._read(pipeline, reports)),
            asyncio.create_task(self._write(pipeline, context)),
        ]
        try:
            ended, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _read(
        self, pipeline: AttachedPipeline, reports: AsyncIterator[pipeline_pb2.PipelineReport]
    ) -> None:
        async for report in reports:
            match report.WhichOneof("report"):
                case "step":
                    self._router.report(pipeline, report.step)
                case "leaving":
                    self._router.leave(pipeline)
                case _:
                    raise InvalidRequestError("a report behind Hello is not a StepReport")

    async def _write(self, pipeline: AttachedPipeline, context: Context) -> None:
        while order := await pipeline.orders.get():
            await context.write(order)
