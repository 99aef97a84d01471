"""What the router tells of its services to programs that have no stubs, as grpcurl."""

from typing import Any

import grpc.aio
import pytest
from described_wire import SERVICE, DescribedWire
from fake_head import PATIENCE
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from served_router import run, site

from cluster.front.tenants import Tenant, Tenants

METADATA = (("authorization", "Bearer a-token"),)
TENANTS = Tenants({"a-token": Tenant("a")})


async def told(channel: grpc.aio.Channel, metadata: Any = METADATA, **asked: str) -> Any:
    """The answer to one question."""
    questions = iter([ServerReflectionRequest(**asked)])
    call = ServerReflectionStub(channel).ServerReflectionInfo(
        questions, metadata=metadata, timeout=PATIENCE
    )
    return await call.read()


def test_it_names_the_services() -> None:
    async def scenario() -> None:
        async with site(tenants=TENANTS) as at, grpc.aio.insecure_channel(at.target) as channel:
            answer = await told(channel, list_services="")
            names = {service.name for service in answer.list_services_response.service}
            assert names == {  # and not PipelineRegistry, which is inside
                SERVICE,
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }

    run(scenario)


def test_what_it_tells_is_enough_to_call() -> None:
    async def scenario() -> None:
        async with site(tenants=TENANTS) as at, grpc.aio.insecure_channel(at.target) as channel:
            answer = await told(channel, file_containing_symbol=SERVICE)
            files = map(
                FileDescriptorProto.FromString, answer.file_descriptor_response.file_descriptor_proto
            )
            wire = DescribedWire(files)
            async with at.head():
                state = await wire.call(channel, "GetClusterState", metadata=METADATA)
            assert (state.model, [each.pipeline_id for each in state.pipelines]) == ("toy", ["p"])

    run(scenario)


@pytest.mark.parametrize(
    ("metadata", "problem"), [((), "is missing"), ((("authorization", "Bearer b"),), "is not known")]
)
def test_it_tells_tenants_alone(metadata: Any, problem: str) -> None:
    async def scenario() -> None:
        async with site(tenants=TENANTS) as at, grpc.aio.insecure_channel(at.target) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await told(channel, metadata, list_services="")
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert problem in (refused.value.details() or "")

    run(scenario)
