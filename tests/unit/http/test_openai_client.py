"""OpenAI's own client against the router's HTTP port."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from fake_head import finished, hello, tokens
from letters import FACTS
from served_router import Site, run, site

from cluster.front.tenants import Tenant, Tenants
from pyramidserve.errors import OverloadedError
from pyramidserve.types import Compression
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.v1.pipeline_pb2 import StepReport
from workers.policies.registry import plan

HI = [{"role": "user", "content": "Hi"}]
# OpenAI's client has types of what it knows alone, and not of what we add.
Scenario = Callable[[Site, Any], Awaitable[None]]


@asynccontextmanager
async def answering(at: Site) -> AsyncIterator[Any]:
    """A client, and a head that gives every request all its output, " 0 1 2 …"."""
    async with at.head(hello(pages=(64, 64), max_sequences=32)) as head, at.openai() as client:
        running = asyncio.create_task(head.run())
        yield client
        running.cancel()


def served(scenario: Scenario, queue_limit: int = 64) -> None:
    async def whole() -> None:
        async with site(queue_limit=queue_limit) as at:
            async with answering(at) as client:
                await scenario(at, client)
            await at.emptied()

    run(whole)


def test_a_chat() -> None:
    async def scenario(at: Site, client: Any) -> None:
        reply = await client.chat.completions.create(model="toy", messages=HI, max_completion_tokens=3)
        (choice,) = reply.choices
        assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
        assert choice.message.content == " 0 1 2"
        assert choice.message.tool_calls is choice.logprobs is None
        usage = reply.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (9, 3, 12)
        assert usage.prompt_tokens_details.cached_tokens == 0
        assert (reply.object, reply.model) == ("chat.completion", "toy")
        assert reply.id.startswith("chatcmpl-")
        assert reply._request_id == reply.id
        receipt = reply.model_extra["pyramidserve"]
        assert (receipt["output_tokens"], receipt["finish_reason"]) == (3, "length")
        assert receipt["pipeline_id"] == "p"
        async with at.http() as plain:
            ended = await plain.delete(f"/v1/sessions/{receipt['session_id']}")
            assert ended.json()["turns"] == 1
            again = await plain.delete(f"/v1/sessions/{receipt['session_id']}")
            assert (again.status_code, again.json()["error"]["code"]) == (404, "unknown_session")

    served(scenario)


@pytest.mark.parametrize("with_usage", [None, {"include_usage": True}])
def test_a_chat_as_a_stream(with_usage: dict[str, bool] | None) -> None:
    async def scenario(at: Site, client: Any) -> None:
        stream = await client.chat.completions.create(
            model="toy",
            messages=HI,
            max_tokens=5,
            stream=True,
            stream_options=with_usage,
        )
        chunks = [chunk async for chunk in stream]
        assert len({(each.id, each.created, each.model, each.object) for each in chunks}) == 1
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[0].choices[0].delta.content == ""
        with_choice = [each for each in chunks if each.choices]
        assert "".join(each.choices[0].delta.content or "" for each in with_choice) == " 0 1 2 3 4"
        reasons = [each.choices[0].finish_reason for each in with_choice]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]
        *before, last = chunks
        assert last.model_extra["pyramidserve"]["output_tokens"] == 5
        if with_usage:
            assert not last.choices
            assert last.usage.total_tokens == 14
            assert all(each.usage is None for each in before)
        else:
            assert last.usage is None

    served(scenario)


def test_usage_in_every_chunk() -> None:
    async def scenario(at: Site, client: Any) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        stream = await client.chat.completions.create(
            model="toy",
            messages=HI,
            max_tokens=5,
            stream=True,
            stream_options=options,
        )
        counts = [chunk.usage.completion_tokens async for chunk in stream]
        assert (counts[0], counts[-1]) == (0, 5)
        assert counts == sorted(counts)

    served(scenario)


def test_what_is_on_the_device_in_every_chunk() -> None:
    asked = {"policy": "streaming", "parameters": {"sinks": 2, "window": 8}}
    compression = Compression("streaming", parameters={"sinks": 2, "window": 8})

    async def scenario(at: Site, client: Any) -> None:
        for options in (None, {"continuous_kv_tokens": True}):
            stream = await client.completions.create(
                model="toy",
                prompt="x" * 40,
                n=2,
                max_tokens=20,
                stream=True,
                stream_options=options,
                extra_body={"compression": asked},
            )
            written, seen = [0, 0], 0
            async for chunk in stream:
                (choice,) = chunk.choices
                written[choice.index] += len(choice.text.split())
                told = choice.model_extra.get("kv_tokens")
                if told:
                    fed, keep = written[choice.index] - 1, plan(compression, 41, FACTS.layers)
                    assert told == {"all": 41 + fed, "device": [keep.tokens(each, fed) for each in (0, 1)]}
                    assert told["device"][0] < 41
                    seen += 1
            assert bool(seen) == bool(options)

    served(scenario)


def test_several_prompts_and_several_choices() -> None:
    async def scenario(at: Site, client: Any) -> None:
        reply = await client.completions.create(
            model="toy", prompt=["ab", "abc"], n=2, max_tokens=2, echo=True
        )
        assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in reply.choices] == ["ab 0 1"] * 2 + ["abc 0 1"] * 2
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (7, 8)
        assert len(reply.model_extra["pyramidserve"]["receipts"]) == 4
        by_ids = await client.completions.create(model="toy", prompt=[[1, 2], [3]])
        assert [choice.text.split()[-1] for choice in by_ids.choices] == ["15", "15"]  # 16 tokens
        stream = await client.completions.create(model="toy", prompt=[5, 6], n=3, max_tokens=4, stream=True)
        said = ["", "", ""]
        async for chunk in stream:
            for choice in chunk.choices:
                said[choice.index] += choice.text
        assert said == [" 0 1 2 3"] * 3

    served(scenario)


def test_what_is_asked_arrives() -> None:
    async def whole() -> None:
        async with site() as at, at.head() as head, at.openai() as client:
            asking = asyncio.create_task(
                client.chat.completions.create(
                    model="toy",
                    messages=[
                        {"role": "developer", "content": "Be brief."},
                        {
                            "role": "user",
                            "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}],
                        },
                    ],
                    temperature=0.5,
                    top_p=0.9,
                    seed=11,
                    stop=["x", "yy"],
                    max_completion_tokens=7,
                    user="someone",
                    store=False,
                    metadata={"a": "b"},
                    parallel_tool_calls=None,
                    extra_body={
                        "top_k": 5,
                        "stop_token_ids": [3],
                        "ignore_eos": True,
                        "compression": {"policy": "h2o", "kv_keep": 0.5, "parameters": {"drop": 4}},
                        "session_id": "talk",
                        "priority": "high",
                        "nobody_knows_this": 1,
                    },
                )
            )
            start = await head.started()
            sampling, stopping, compression = start.sampling, start.stopping, start.compression
            assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (
                0.5,
                0.9,
                5,
                11,
            )
            assert (stopping.max_tokens, list(stopping.stop), stopping.ignore_eos) == (7, ["x", "yy"], True)
            assert list(stopping.stop_token_ids) == [3]
            assert (compression.policy, compression.kv_keep) == ("h2o", 0.5)
            assert dict(compression.parameters) == {"drop": 4}
            assert start.session_id == "talk"
            letters = "system:Be brief.;user:Hi;"
            assert list(start.prompt_ids) == [0, *(ord(each) % 100 for each in letters)]
            asking.cancel()
            assert await head.cancelled() == start.sequence_id

    run(whole)


@pytest.mark.parametrize(
    ("kv_dtype", "share", "policy", "kv_keep"),
    [
        *(("float32", 0.5, "defensive", 0.25), ("float16", 0.5, "defensive", 0.5)),
        *(("int8", 0.375, "defensive", 0.5), ("int8", 0.75, "full", 0)),
    ],
)
def test_a_share_of_bytes_becomes_tokens_by_the_format_of_the_pipelines(
    kv_dtype: str, share: float, policy: str, kv_keep: float
) -> None:
    async def whole() -> None:
        async with site() as at, at.head(hello(kv_dtype=kv_dtype)) as head, at.openai() as client:
            asking = asyncio.create_task(
                client.completions.create(
                    model="toy",
                    prompt=[5] * 40,
                    extra_body={
                        "compression": {"policy": "auto", "kv_bytes_keep": share},
                        "recall": "turn",
                    },
                )
            )
            told = (await head.started()).compression
            assert (told.policy, told.kv_keep, told.kv_bytes_keep) == (policy, kv_keep, share)
            assert told.recall == "turn"
            asking.cancel()

    run(whole)


@pytest.mark.parametrize(
    ("extra", "names", "kind"),
    [
        ({"temperature": -1}, "temperature is -1", openai.BadRequestError),
        ({"temperature": "hot"}, "temperature is 'hot'", openai.BadRequestError),
        ({"max_tokens": 0}, "max_tokens is 0", openai.BadRequestError),
        ({"n": 1000}, "n is 1000", openai.BadRequestError),
        ({"messages": []}, "chat has 0 messages", openai.BadRequestError),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role is 'robot'", openai.BadRequestError),
        ({"messages": [{"content": "x"}]}, "messages.0.role is missing", openai.BadRequestError),
        ({"model": "gpt-9"}, "model is 'gpt-9'", openai.NotFoundError),
        ({"compression": {"policy": "magic"}}, "magic", openai.BadRequestError),
        ({"compression": {"kvkeep": 1}}, "compression.kvkeep", openai.BadRequestError),
        (
            {"compression": {"policy": "h2o", "kv_keep": 0.5, "kv_bytes_keep": 0.25}},
            "kv_keep 0.5 was given beside kv_bytes_keep 0.25",
            openai.BadRequestError,
        ),
        ({"compression": {"policy": "auto"}}, "neither kv_bytes_keep nor kv_keep", openai.BadRequestError),
        ({"priority": "urgent"}, "priority is 'urgent'", openai.BadRequestError),
        ({"deadline": 0}, "deadline is 0", openai.BadRequestError),
        ({"max_tokens": 1000}, "max_tokens is 1000", openai.BadRequestError),
        ({"stop_token_ids": [-1]}, "token id -1", openai.BadRequestError),
        ({"top_k": 2**40}, "top_k must be", openai.BadRequestError),
        ({"seed": 2**70}, "seed must be", openai.BadRequestError),
    ],
)
def test_bad_input_names_the_value(
    extra: dict[str, object], names: str, kind: type[openai.APIStatusError]
) -> None:
    async def scenario(at: Site, client: Any) -> None:
        with pytest.raises(kind, match=names) as raised:
            await client.chat.completions.create(model="toy", messages=HI, extra_body=extra)
        body = raised.value.body
        assert isinstance(body, dict)
        assert set(body) == {"message", "type", "param", "code"}
        assert raised.value.response.headers["x-should-retry"] == "false"

    served(scenario)


@pytest.mark.parametrize(
    "extra",
    [
        {"n": 1, "presence_penalty": 0, "logit_bias": None, "response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "auto", "stop": None, "stream_options": None, "logprobs": False},
        {"temperature": None, "max_tokens": None, "max_completion_tokens": 4, "top_p": None, "user": None},
    ],
)
def test_what_changes_nothing_is_taken(extra: dict[str, object]) -> None:
    async def scenario(at: Site, client: Any) -> None:
        extra.setdefault("max_tokens", 4)
        reply = await client.chat.completions.create(model="toy", messages=HI, extra_body=extra)
        assert reply.choices[0].message.content == " 0 1 2 3"

    served(scenario)


def test_a_full_queue_says_when_to_come_again() -> None:
    async def whole() -> None:
        async with site(queue_limit=1) as at, at.openai() as client, at.openai(retries=2) as patient:
            waiting = asyncio.create_task(client.completions.create(model="toy", prompt="a"))
            while not at.router.state().queued:
                await asyncio.sleep(0)
            with pytest.raises(openai.RateLimitError) as refused:
                await client.completions.create(model="toy", prompt="b")
            error = refused.value
            assert (error.code, error.type) == (OverloadedError.reason, "rate_limit_error")
            assert float(error.response.headers["retry-after-ms"]) > 0
            again = asyncio.create_task(patient.completions.create(model="toy", prompt="b"))
            async with at.head(hello(pages=(64, 64))) as head:
                running = asyncio.create_task(head.run())
                assert (await waiting).choices[0].text.startswith(" 0 1")
                assert (await again).choices[0].text.startswith(" 0 1")
                running.cancel()

    run(whole)


def test_an_error_in_a_stream_that_has_begun() -> None:
    async def whole() -> None:
        async with site() as at, at.head() as head, at.openai() as client:
            stream = await client.completions.create(
                model="toy", prompt="a", stream=True, extra_body={"deadline": 0.3}
            )
            await head.started()
            with pytest.raises(openai.APIError, match=r"deadline is 0\.3 s"):
                async for _ in stream:
                    pass
            await head.cancelled()
        await at.emptied()

    run(whole)


def test_disconnecting_at_any_moment_leaves_nothing_behind() -> None:
    chance = random.Random(0)

    async def scenario(at: Site, client: Any) -> None:
        async def disconnect(number: int) -> None:
            stream = bool(number % 2)
            asking = asyncio.create_task(
                client.completions.create(
                    model="toy", prompt="abc", n=1 + number % 3, max_tokens=90, stream=stream
                )
            )
            for _ in range(chance.randrange(200)):
                await asyncio.sleep(0)
            await asyncio.sleep(chance.random() * 0.02)
            asking.cancel()
            began: tuple[Any, ...] = await asyncio.gather(asking, return_exceptions=True)
            if stream and not isinstance(began[0], BaseException):
                await began[0].close()

        await asyncio.gather(*map(disconnect, range(100)))

    served(scenario, queue_limit=400)


def test_bearer_tokens_and_their_tenants() -> None:
    async def whole() -> None:
        tenants = Tenants({"a-token": Tenant("a")})
        async with site(tenants=tenants) as at, at.head() as head:
            running = asyncio.create_task(head.run())
            async with at.openai("a-token") as client, at.openai("guess") as guessing, at.http() as plain:
                assert [model.id async for model in client.models.list()] == ["toy"]
                assert (await client.models.retrieve("toy")).id == "toy"
                with pytest.raises(openai.AuthenticationError, match="is not known"):
                    await guessing.models.list()
                with pytest.raises(openai.NotFoundError, match="model is 'other'"):
                    await client.models.retrieve("other")
                for path in ("/v1/models", "/tokenizer_info", "/openapi.json"):
                    assert (await plain.get(path)).status_code == 401
                for path in ("/health", "/-/healthz", "/version"):
                    assert (await plain.get(path)).status_code == 200
            running.cancel()

    run(whole)


def test_responses() -> None:
    async def scenario(at: Site, client: Any) -> None:
        reply = await client.responses.create(
            model="toy", input="Hi", instructions="Brief", max_output_tokens=3
        )
        assert reply.output_text == " 0 1 2"
        assert (reply.status, reply.usage.output_tokens) == ("incomplete", 3)
        kinds, text = [], ""
        async with client.responses.stream(model="toy", input=HI, max_output_tokens=4) as stream:
            async for event in stream:
                kinds.append(event.type)
                text += event.delta if event.type == "response.output_text.delta" else ""
        assert text == " 0 1 2 3"
        assert (kinds[0], kinds[-1]) == ("response.created", "response.incomplete")

    served(scenario)


def test_a_conversation_whose_client_gives_no_name_is_found_again() -> None:
    async def whole() -> None:
        async with site() as at, at.head(hello(pages=(64, 64))) as head, at.openai() as client:

            async def ask(*said: str, salt: str = "") -> str:
                """Asks with a whole history; returns the session that the pipeline is told."""
                roles = ("user", "assistant")
                messages = [{"role": roles[i % 2], "content": each} for i, each in enumerate(said)]
                asking = asyncio.create_task(
                    client.chat.completions.create(
                        model="toy", messages=messages, max_tokens=2, extra_body={"cache_salt": salt}
                    )
                )
                start = await head.started()
                key = start.sequence_id
                said_now = [tokens(key, 0, 0, 1)]
                await head.report(StepReport(tokens=said_now, finished=[finished(key, output_tokens=2)]))
                await asking
                return start.session_id

            first = await ask("Hi")
            assert first
            assert await ask("Hi", " 0 1", "And?") == first
            assert await ask("Hi", " 0 1", "And?", " 0 1", "So?") == first
            others = [
                await ask("Hi"),
                await ask("Hi", "Ho", "And?"),
                await ask("Hi", " 0 1", "?", salt="x"),
            ]
            assert len({first, *others}) == 4

    run(whole)


def test_what_a_body_does_not_say_is_left_to_the_deployment() -> None:
    async def whole() -> None:
        async with site() as at, at.http() as client:
            asked = []
            begin = at.front.begin

            async def recorded(tenant: str, request: pb.GenerateRequest, *rest: Any) -> Any:
                asked.append(request.sampling)
                return await begin(tenant, request, *rest)

            at.front.begin = recorded  # type: ignore[method-assign, assignment]
            async with at.head() as head:
                running = asyncio.create_task(head.run())
                for body in ({}, {"temperature": 0, "repetition_penalty": 1.0}):
                    await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1} | body)
                running.cancel()
            assert [each.HasField("temperature") for each in asked] == [False, True]
            assert [each.HasField("repetition_penalty") for each in asked] == [False, True]

    run(whole)


def test_choices_have_a_bound_where_prompts_are_scored_too() -> None:
    async def scenario(at: Site, client: Any) -> None:
        with pytest.raises(openai.BadRequestError, match="129 prompts, which are 129 choices"):
            await client.completions.create(model="toy", prompt=["x"] * 129, echo=True, logprobs=1)

    served(scenario)


def test_responses_are_drawn_as_they_ask() -> None:
    async def whole() -> None:
        async with site() as at, at.head() as head, at.http() as client:
            body = {"input": "Hi", "presence_penalty": 0.5, "logit_bias": {"7": 2.0}, "min_tokens": 2}
            asking = asyncio.create_task(client.post("/v1/responses", json=body))
            start = await head.started()
            assert (start.sampling.presence_penalty, start.stopping.min_tokens) == (0.5, 2)
            assert dict(start.sampling.logit_bias) == {7: 2.0}
            assert not start.sampling.HasField("logprobs")
            asking.cancel()
            assert await head.cancelled() == start.sequence_id

    run(whole)


def test_responses_tell_of_likelihoods() -> None:
    async def whole() -> None:
        async with site() as at, at.head() as head, at.openai() as client:
            asking = asyncio.create_task(
                client.responses.create(
                    model="toy", input="Hi", include=["message.output_text.logprobs"], top_logprobs=2
                )
            )
            start = await head.started()
            assert start.sampling.logprobs == 2
            likely = pb.TokenLogprob(logprob=-0.5, top_ids=[65, 66], top_logprobs=[-0.5, -1.5])
            said = tokens(start.sequence_id, 0, 65)
            said.tokens.logprobs.append(likely)
            await head.report(StepReport(tokens=[said], finished=[finished(start.sequence_id, "r", 1)]))
            ((told,),) = ([part.logprobs for part in item.content] for item in (await asking).output)
            assert [(each.token, each.logprob) for each in told] == [("A", -0.5)]
            assert [(each.token, each.bytes) for each in told[0].top_logprobs] == [("A", [65]), ("B", [66])]

    run(whole)
