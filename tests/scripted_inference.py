"""An Inference service that says what a test scripts."""

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NoReturn

import grpc

from pyramidserve.errors import PyramidServeError, UnknownSessionError
from pyramidserve.types import (
    ClusterState,
    DeviceBytes,
    Event,
    FinishReason,
    LayerReceipt,
    PipelineState,
    Receipt,
    StageState,
    Started,
    Tokens,
)
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.v1.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server
from pyramidserve.wire import cluster_state_to_message, error_to_metadata, event_to_message
from pyramidserve.wire.error import STATUS

Script = Callable[[pb.GenerateRequest, grpc.ServicerContext], Iterator[Event]]

STATE = ClusterState(
    model="tiny-llama",
    queued=1,
    running=2,
    queue_limit=64,
    sessions=3,
    pipelines=(
        PipelineState(
            pipeline_id="gang-0",
            stages=(
                StageState(
                    first_layer=0,
                    end_layer=2,
                    pid=4242,
                    node="node-a",
                    pages_total=512,
                    pages_in_use=17,
                    pages_reserved=31,
                    page_bytes=16 * 2**10,
                    host_bytes=3 * 2**20,
                    host_bytes_limit=2**33,
                    workspace_bytes=5 * 2**20,
                    resident_bytes=300 * 2**20,
                    device_bytes=200 * 2**20,
                    device_peak_bytes=250 * 2**20,
                    tensor_names=("model.embed_tokens.weight",),
                ),
            ),
            sequences=2,
            max_sequences=8,
        ),
    ),
    decisions={"admitted": 5},
)


def receipt(request_id: str, output_tokens: int) -> Receipt:
    """A receipt with something in every field."""
    return Receipt(
        request_id=request_id,
        finish_reason=FinishReason.STOP,
        stop_string="END",
        prompt_tokens=2,
        output_tokens=output_tokens,
        seed=-7,
        policy="pyramid/evict",
        kv_keep_target=0.25,
        kv_keep_reached=0.5,
        kv_keep_bound_by="minimum context",
        peak_device_bytes=DeviceBytes(2**40, 2, 3, 4),
        spilled_bytes=3 * 2**19,
        recalled_bytes=2**34,
        dropped_bytes=1,
        queue_time=0.01,
        time_to_first_token=0.12,
        inter_token_p50=0.025,
        inter_token_p99=0.04,
        layers=(LayerReceipt(0, 2, 3, 4, 5, 6), LayerReceipt(1, 1, 2, 3, 4, 5)),
        pipeline_id="gang-0",
        preemptions=6,
        replays=7,
        recall="exact",
        host_attended_bytes=11,
        reused_tokens=8,
        drafted_tokens=10,
        accepted_tokens=9,
        device_peak_bytes=2**41,
        kv_bytes_keep_target=0.125,
        kv_bytes_keep_reached=0.26,
    )


def echo(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Event]:
    """Says the prompt, or the last message of a conversation, a word at a time."""
    words = re.findall(r"\s*\S+", request.text or request.chat.messages[-1].content)
    yield Started(prompt_tokens=len(words), seed=7)
    for index, word in enumerate(words):
        yield Tokens(index, (100 + index,), word)
    yield receipt(request.request_id, len(words))


def hold(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Event]:
    """Says one word and then nothing for as long as the client listens."""
    over = threading.Event()
    yield Started(prompt_tokens=1, seed=7)
    yield Tokens(0, (100,), "held")
    if context.add_callback(over.set):
        over.wait()


def refuse(error: PyramidServeError) -> Script:
    """Refuses every request."""

    def script(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Event]:
        yield from ()
        _abort(context, error)

    return script


class ScriptedInference(InferenceServicer):
    """Follows ``script`` and remembers what it was asked.

    Attributes:
        ended: set as soon as a Generate call is over, cancelled or not.
        turns: turns of each live session.
    """

    def __init__(self) -> None:
        self.script: Script = echo
        self.requests: list[pb.GenerateRequest] = []
        self.ended = threading.Event()
        self.turns: dict[str, int] = {}

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.turns[request.session_id] = self.turns.get(request.session_id, 0) + 1
        context.add_callback(self.ended.set)
        return map(event_to_message, self.script(request, context))

    def EndSession(  # noqa: N802
        self, request: pb.EndSessionRequest, context: grpc.ServicerContext
    ) -> pb.EndSessionResponse:
        if request.session_id not in self.turns:
            _abort(context, UnknownSessionError(f"there is no session {request.session_id!r}"))
        return pb.EndSessionResponse(turns=self.turns.pop(request.session_id))

    def GetClusterState(  # noqa: N802
        self, request: pb.GetClusterStateRequest, context: grpc.ServicerContext
    ) -> pb.GetClusterStateResponse:
        return cluster_state_to_message(STATE)


@contextmanager
def serving(service: InferenceServicer) -> Iterator[str]:
    """Serves ``service`` on a free port and yields its "host:port"."""
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=[("grpc.so_reuseport", 0)])
    add_InferenceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def _abort(context: grpc.ServicerContext, error: PyramidServeError) -> NoReturn:
    context.set_trailing_metadata(error_to_metadata(error))
    context.abort(STATUS[type(error)], error.message)
