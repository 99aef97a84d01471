"""Whatever is sent, by HTTP or gRPC: no server's error, and nothing is left of it."""

import asyncio
import json
from contextlib import suppress
from typing import Any

import grpc.aio
import pytest
from fake_head import hello
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from served_router import run, site

from cluster.http.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from cluster.http.response_bodies import ResponseBody
from pyramidserve.errors import PyramidServeError
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.v1.inference_pb2_grpc import InferenceStub
from pyramidserve.wire.error import ERROR_DETAIL_KEY

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponseBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
TEXT = st.text(max_size=12)
NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.integers(-3, 40)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def called(name: str, arguments: str) -> dict[str, Any]:
    """A call of a tool."""
    return {"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str) -> dict[str, Any]:
    """A tool, whose parameters are another of its name."""
    own = {"name": name, "parameters": {"properties": {name: {}}}}
    return {"type": "function", "function": own} | own  # as chats have it, and as responses


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "developer", "tool", "x"])},
        optional={
            "content": TEXT | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT})),
            "tool_calls": st.lists(st.builds(called, TEXT, TEXT), max_size=2),
            "tool_call_id": TEXT,
        },
    ),
    max_size=3,
)
ITEMS = st.lists(
    st.fixed_dictionaries({"type": st.just("function_call"), "call_id": TEXT, "name": TEXT})
    | st.fixed_dictionaries({"type": st.just("function_call_output"), "call_id": TEXT, "output": TEXT}),
    max_size=2,
)
# Values that fields may well have, so that not all is refused for its first.
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "messages": MESSAGES,
    "input": TEXT | MESSAGES | st.builds(list.__add__, MESSAGES, ITEMS),
    "prompt": TEXT | st.lists(st.integers(0, 99), max_size=5) | st.lists(TEXT, max_size=3),
    "model": st.sampled_from(["toy", "", None]),
    "stream": st.booleans(),
    "max_tokens": st.integers(1, 8),
    "max_output_tokens": st.integers(1, 8),
    "n": st.integers(1, 3),
    "temperature": st.floats(0, 2),
    "tokens": st.lists(st.integers(0, 99), max_size=5),
    "logit_bias": st.dictionaries(st.integers(0, 99).map(str), st.floats(-100, 100), max_size=2),
    "tools": st.none() | st.lists(st.sampled_from(["a", "b", "c d", "auto"]).map(tool), max_size=2),
    "tool_choice": st.sampled_from([None, "auto", "none", "required", "a", "b"]),
    "chat_template_kwargs": st.none() | st.dictionaries(TEXT, ANYTHING, max_size=1),
    "stop": TEXT | st.lists(TEXT, max_size=3),
}


@st.composite
def posts(draw: st.DrawFn) -> tuple[str, bytes]:
    """A route, and a body for it that is mostly sound."""
    path = draw(st.sampled_from(list(BODIES)))
    known = list(BODIES[path].model_fields)
    body: dict[str, Any] = {name: draw(LIKELY[name]) for name in known if name in LIKELY}
    for name in draw(st.lists(st.sampled_from([*known, "suffix", "?"]), max_size=3)):
        body[name] = draw(ANYTHING)
    whole = json.dumps(body).encode()
    return path, draw(st.sampled_from([whole] * 8 + [whole[:-1], whole[: len(whole) // 2], b"", b"\xff"]))


def anything(descriptor: Any) -> st.SearchStrategy[Any]:
    """Messages of a type, any of whose fields may be there."""
    kind = descriptor._concrete_class

    @st.composite
    def built(draw: st.DrawFn) -> Any:
        message = kind()
        for field in descriptor.fields:
            if field.message_type is not None or not draw(st.booleans()):
                continue
            value = {
                field.CPPTYPE_STRING: TEXT,
                field.CPPTYPE_BOOL: st.booleans(),
                field.CPPTYPE_DOUBLE: st.floats(),
                field.CPPTYPE_ENUM: st.integers(-2, 5),
            }.get(field.cpp_type, st.integers(-(2**31), 2**31 - 1) | st.integers(0, 9))
            if field.is_repeated:
                getattr(message, field.name).extend(draw(st.lists(value, max_size=3)))
            else:
                setattr(message, field.name, draw(value))
        return message

    return built()


@st.composite
def requests(draw: st.DrawFn) -> pb.GenerateRequest:
    """A request by gRPC, mostly sound."""
    request: pb.GenerateRequest = draw(anything(pb.GenerateRequest.DESCRIPTOR))
    request.request_id = request.request_id or draw(st.text(min_size=1, max_size=4))
    if draw(st.booleans()):
        request.token_ids.ids.extend(draw(st.lists(st.integers(0, 99), min_size=1, max_size=5)))
    for name in ("sampling", "stopping", "compression", "chat", "constraint"):
        if draw(st.integers(0, 3)) == 0:
            part = getattr(request, name)
            part.CopyFrom(draw(anything(part.DESCRIPTOR)))
    if not request.HasField("stopping"):
        request.stopping.max_tokens = draw(st.integers(1, 8))
    return request


@settings(max_examples=examples(10))
@given(st.lists(posts(), min_size=30, max_size=30))
def test_any_body_is_answered_or_refused(asked: list[tuple[str, bytes]]) -> None:
    async def whole() -> None:
        async with site(queue_limit=200) as at, at.head(hello(pages=(64, 64))) as head, at.http() as client:
            running = asyncio.create_task(head.run())
            client.headers["content-type"] = "application/json"
            for path, body in asked:
                reply = await client.post(path, content=body)
                assert reply.status_code < 500, (path, body, reply.text)
                if reply.status_code != 200:
                    assert reply.json()["error"]["message"], (path, body)
                elif "text/event-stream" in reply.headers["content-type"]:
                    assert '"error"' not in reply.text or '"error": null' in reply.text, (path, body)
            await at.emptied()
            running.cancel()

    run(whole)


@settings(max_examples=examples(10))
@given(st.lists(requests(), min_size=30, max_size=30))
def test_any_message_is_answered_or_refused(asked: list[pb.GenerateRequest]) -> None:
    async def whole() -> None:
        async with site(queue_limit=200) as at, at.head(hello(pages=(64, 64))) as head:
            running = asyncio.create_task(head.run())
            async with grpc.aio.insecure_channel(at.target) as channel:
                for request in asked:
                    call = InferenceStub(channel).Generate(request)
                    with suppress(grpc.aio.AioRpcError):
                        assert [each async for each in call][-1].HasField("receipt")
                    code = await call.code()
                    assert code is not grpc.StatusCode.INTERNAL, request
                    told = ERROR_DETAIL_KEY in dict(await call.trailing_metadata())
                    assert told == (code is not grpc.StatusCode.OK), request
            await at.emptied()
            running.cancel()

    run(whole)


def test_the_tree_of_errors_has_a_status_each() -> None:
    from cluster.http.errors import status_of

    def all_of(kind: type[PyramidServeError]) -> list[type[PyramidServeError]]:
        return [kind, *(each for sub in kind.__subclasses__() for each in all_of(sub))]

    for kind in all_of(PyramidServeError)[1:]:
        status, _ = status_of(kind("x"))
        assert 400 <= status < 600
    with pytest.raises(StopIteration):
        status_of(PyramidServeError("x"))
