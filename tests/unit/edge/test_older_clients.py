"""The public wire only grows: a client that is older than the router goes on as it did."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc.aio
import pytest
from described_wire import DescribedWire, pool_of
from fake_head import hello
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from google.protobuf.descriptor_pool import Default, DescriptorPool
from letters import Letters
from served_router import run, site

from pyramidserve.chat import Chat
from pyramidserve.types import ChatMessage
from pyramidserve.v1 import inference_pb2 as pb

# As it was when gRPC was the only way in.
OLD = Path(__file__).parents[2] / "data" / "wire_before_http.proto"
KNOBS = {"prefill_decay_ratio": 0.5, "min_context_length": 8}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptorSet:
    """The old wire, with what it imports."""
    described = tmp_path_factory.mktemp("wire") / "described"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{OLD.parent}", "--include_imports"]
    subprocess.run([*command, f"--descriptor_set_out={described}", OLD.name], check=True)
    return FileDescriptorSet.FromString(described.read_bytes())


def promises(pool: DescriptorPool, name: str) -> dict[str, object]:
    """What a file says of each field, enum value and method, by their full names."""
    file = pool.FindFileByName(name)
    found: dict[str, object] = {}
    for service in file.services_by_name.values():
        found |= {method.full_name: _of_method(method) for method in service.methods}
    for enum in file.enum_types_by_name.values():
        found |= _of_enum(enum)
    for message in file.message_types_by_name.values():
        found |= _of_message(message)
    return found


def _of_message(message: Descriptor) -> dict[str, object]:
    found: dict[str, object] = {message.full_name: "a message"}
    found |= {field.full_name: _of_field(field) for field in message.fields}
    for nested in message.nested_types:
        found |= _of_message(nested)
    for enum in message.enum_types:
        found |= _of_enum(enum)
    return found


def _of_field(field: FieldDescriptor) -> object:
    kind = field.message_type or field.enum_type
    choice = field.containing_oneof
    return (
        *(field.number, field.type, kind.full_name if kind else None),
        *(field.is_repeated, field.is_packed, field.has_presence),
        *(choice.name if choice else None, field.json_name),
    )


def _of_enum(enum: EnumDescriptor) -> dict[str, object]:
    return {f"{enum.full_name}.{value.name}": value.number for value in enum.values}


def _of_method(method: MethodDescriptor) -> object:
    types = method.input_type.full_name, method.output_type.full_name
    return *types, method.client_streaming, method.server_streaming


def test_all_of_the_old_wire_is_there(old: FileDescriptorSet) -> None:
    before = promises(pool_of(old.file), OLD.name)
    now = promises(Default(), pb.DESCRIPTOR.name)
    assert {name: now.get(name) for name in before} == before


def _field(file: FileDescriptorProto, message: str, name: str) -> FieldDescriptorProto:
    (found,) = (each for each in _message(file, message).field if each.name == name)
    return found


def _message(file: FileDescriptorProto, name: str) -> DescriptorProto:
    (found,) = (each for each in file.message_type if each.name == name)
    return found


def _renumber(file: FileDescriptorProto) -> None:
    _field(file, "Receipt", "layers").number = 99


def _retype(file: FileDescriptorProto) -> None:
    _field(file, "Stopping", "ignore_eos").type = FieldDescriptorProto.TYPE_INT32


def _repeat(file: FileDescriptorProto) -> None:
    _field(file, "Receipt", "policy").label = FieldDescriptorProto.LABEL_REPEATED


def _leave_the_choice(file: FileDescriptorProto) -> None:
    _field(file, "GenerateRequest", "text").ClearField("oneof_index")


def _forget_presence(file: FileDescriptorProto) -> None:
    field = _field(file, "ChatPrompt", "continue_final_message")
    field.ClearField("proto3_optional")
    field.ClearField("oneof_index")
    del _message(file, "ChatPrompt").oneof_decl[:]


def _drop(file: FileDescriptorProto) -> None:
    _message(file, "Compression").field.remove(_field(file, "Compression", "pyramid"))


def _renumber_a_reason(file: FileDescriptorProto) -> None:
    (enum,) = (each for each in file.enum_type if each.name == "FinishReason")
    enum.value[-1].number = 9


def _answer_at_once(file: FileDescriptorProto) -> None:
    file.service[0].method[0].server_streaming = False


CHANGES = [
    *(_renumber, _retype, _repeat, _leave_the_choice, _forget_presence, _drop),
    *(_renumber_a_reason, _answer_at_once),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_each_change_that_is_no_growth_is_seen(
    change: Callable[[FileDescriptorProto], None], old: FileDescriptorSet
) -> None:
    changed = FileDescriptorSet.FromString(old.SerializeToString())
    change(changed.file[-1])
    before, now = (promises(pool_of(each.file), OLD.name) for each in (old, changed))
    differing = [name for name in before if now.get(name) != before[name]]
    assert len(differing) == 1


def test_an_old_client_is_served(old: FileDescriptorSet) -> None:
    async def scenario() -> None:
        wire = DescribedWire(old.file)
        async with (
            site() as at,
            at.head(hello(pages=(64, 64))) as head,
            grpc.aio.insecure_channel(at.target) as channel,
        ):
            events = aiter(
                wire.call(
                    channel,
                    "Generate",
                    request_id="r",
                    session_id="s",
                    chat={"messages": [{"role": "user", "content": "Hi"}]},
                    sampling={"temperature": 0.0, "seed": 7},
                    stopping={"max_tokens": 3, "ignore_eos": True},
                    compression={"policy": "pyramid", "prefill": "evict", "pyramid": KNOBS},
                )
            )
            prompt = Letters().chat(Chat.of([ChatMessage("user", "Hi")]))
            started = (await anext(events)).started
            assert (started.prompt_tokens, started.seed) == (len(prompt), 7)
            start = await head.started()
            assert list(start.prompt_ids) == prompt
            assert (start.compression.policy, start.compression.prefill) == ("pyramid", "evict")
            assert dict(start.compression.parameters.items()) == KNOBS
            running = asyncio.create_task(head.run((start, 0)))
            *output, last = [event async for event in events]
            assert {event.WhichOneof("event") for event in output} == {"tokens"}
            assert [new for event in output for new in event.tokens.token_ids] == [0, 1, 2]
            assert "".join(event.tokens.text for event in output) == " 0 1 2"
            receipt = last.receipt
            assert (receipt.request_id, receipt.output_tokens, receipt.pipeline_id) == ("r", 3, "p")
            assert receipt.finish_reason == pb.FINISH_REASON_LENGTH
            state = await wire.call(channel, "GetClusterState")
            assert dict(state.decisions) == {"admitted": 1, "finished": 1}
            assert (await wire.call(channel, "EndSession", session_id="s")).turns == 1
            running.cancel()

    run(scenario)
