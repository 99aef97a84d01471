"""The HTTP port as curl, browsers and programs find it."""

import asyncio
import json

import pytest
from fake_head import hello
from served_router import MAX_MESSAGE_BYTES, run, site

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def test_a_stream_is_lines_that_end_with_done() -> None:
    async def whole() -> None:
        async with site() as at, at.head() as head, at.http() as client:
            running = asyncio.create_task(head.run())
            reply = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
            assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert reply.headers["cache-control"] == "no-cache"
            *events, last, end = reply.text.split("\n\n")
            assert (last, end) == ("data: [DONE]", "")
            assert all(json.loads(each.removeprefix("data: "))["id"] for each in events)
            running.cancel()

    run(whole)


@pytest.mark.parametrize(
    ("request_of", "status", "says"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "the body is not JSON"),
        ({"content": b"[]", "headers": {"content-type": "application/json"}}, 400, "[]"),
        ({"json": {}}, 400, "messages is missing"),
        ({"content": b"{}"}, 415, "send application/json"),
        ({"data": {"a": "b"}}, 415, "application/x-www-form-urlencoded"),
        ({"json": CHAT | {"x": "y" * MAX_MESSAGE_BYTES}}, 413, "more than 100000 bytes"),
        ({"json": CHAT, "headers": {"origin": "https://evil.example"}}, 403, "evil.example"),
        ({"json": CHAT, "headers": {"host": "evil.example"}}, 403, "evil.example"),
    ],
)
def test_bodies_that_are_refused(request_of: dict[str, object], status: int, says: str) -> None:
    async def whole() -> None:
        async with site() as at, at.http() as client:
            reply = await client.post("/v1/chat/completions", **request_of)  # type: ignore[arg-type]
            assert reply.status_code == status, reply.text
            assert says in reply.json()["error"]["message"]
            assert not at.router.state().queued

    run(whole)


def test_pages_that_may_call() -> None:
    async def whole() -> None:
        async with site() as at, at.http(origin="https://chat.example") as client:
            asked = {
                "access-control-request-method": "POST",
                "access-control-request-headers": "content-type",
            }
            before = await client.options("/v1/chat/completions", headers=asked)
            assert before.status_code == 204
            assert before.headers["access-control-allow-origin"] == "https://chat.example"
            assert before.headers["access-control-allow-headers"] == "content-type"
            proxied = await client.get("/v1/models", headers={"host": "chat.example"})
            assert proxied.status_code == 200
            models = await client.get("/v1/models")
            assert models.headers["access-control-allow-origin"] == "https://chat.example"
            assert models.headers["content-security-policy"].startswith("default-src 'self'")

    run(whole)


def test_health_follows_the_pipelines() -> None:
    async def whole() -> None:
        async with site() as at, at.http() as client:
            assert (await client.get("/health")).status_code == 503
            async with at.head():
                assert (await client.get("/health")).status_code == 200

    run(whole)


def test_tokens_of_texts_and_conversations() -> None:
    async def whole() -> None:
        async with site() as at, at.http() as client:
            whole = (await client.post("/tokenize", json={"prompt": "ab"})).json()
            assert whole == {"count": 3, "max_model_len": 300, "tokens": [0, 97, 98]}
            part = (
                await client.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False})
            ).json()
            assert part["tokens"] == [97, 98]
            chat = (await client.post("/tokenize", json={"messages": CHAT["messages"]})).json()
            assert chat["count"] == 9
            assert (await client.post("/detokenize", json={"tokens": [97, 98]})).json() == {"prompt": "ab"}
            wrong = await client.post("/detokenize", json={"tokens": [100]})
            assert wrong.status_code == 400
            assert "token id 100" in wrong.json()["error"]["message"]
            assert (await client.get("/tokenizer_info")).json()["eos_token"] == ";"

    run(whole)


def test_all_routes_are_described() -> None:
    async def whole() -> None:
        async with site() as at, at.http() as client:
            described = (await client.get("/openapi.json")).json()
            paths = described["paths"]
            assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/health"} <= paths.keys()
            body = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
            schema = described["components"]["schemas"][body["$ref"].rpartition("/")[2]]
            assert {"prompt", "max_tokens", "compression"} <= schema["properties"].keys()
            missing = await client.get("/v1/nothing")
            assert missing.status_code == 404
            assert "/v1/nothing" in missing.json()["error"]["message"]

    run(whole)


def test_the_http_port_is_left_with_the_other() -> None:
    async def whole() -> None:
        async with site() as at, at.head(hello(pages=(64, 64))) as head, at.http() as client:
            long = CHAT | {"max_tokens": 20, "stream": True}
            async with client.stream("POST", "/v1/chat/completions", json=long) as reply:
                start = await head.started()
                stopping = asyncio.create_task(at.server.stop(30))
                running = asyncio.create_task(head.run((start, 0)))
                text = "".join([part async for part in reply.aiter_text()])
                assert text.endswith("data: [DONE]\n\n")
                assert " 19" in text
            await stopping
            running.cancel()

    run(whole)
