"""A client of services that it knows from descriptors alone, as programs have that bring no stubs."""

from collections.abc import Iterable
from typing import Any

import grpc.aio
from fake_head import PATIENCE
from google.protobuf.descriptor_database import DescriptorDatabase
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

SERVICE = "pyramidserve.v1.Inference"


def pool_of(files: Iterable[FileDescriptorProto]) -> DescriptorPool:
    """What is described in ``files``, in any order, and nothing else."""
    database = DescriptorDatabase()
    for file in files:
        database.Add(file)
    return DescriptorPool(database)


class DescribedWire:
    """Calls the public service with messages that ``files`` describe."""

    def __init__(self, files: Iterable[FileDescriptorProto]) -> None:
        self._pool = pool_of(files)
        self._service = self._pool.FindServiceByName(SERVICE)

    def call(self, channel: grpc.aio.Channel, method: str, metadata: Any = None, **fields: Any) -> Any:
        """The call of a method with a request of these fields; its answers are dynamic messages, too."""
        about = self._service.methods_by_name[method]
        asked = GetMessageClass(about.input_type)(**fields)
        kind = channel.unary_stream if about.server_streaming else channel.unary_unary
        call = kind(
            f"/{SERVICE}/{method}",
            request_serializer=type(asked).SerializeToString,
            response_deserializer=GetMessageClass(about.output_type).FromString,
        )
        return call(asked, metadata=metadata, timeout=PATIENCE)
