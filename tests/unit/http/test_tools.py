"""Tools by OpenAI's own client and by the SDK: what arrives at a pipeline, and what comes back of calls."""

import asyncio
from typing import Any

import openai
import pytest
from fake_head import finished
from served_router import Site, run, site

from pyramidserve.errors import InvalidRequestError
from pyramidserve.tools import Tool, ToolCall
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.v1.pipeline_pb2 import SequenceTokens, StepReport

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "time"}}
ASKED = [{"role": "user", "content": "Weather?"}]
CALLED = [
    pb.Tokens(index=0, token_ids=[5], text="Hm."),
    pb.Tokens(index=1, token_ids=[6], tool_calls=[pb.ToolCallPart(id="a1", name="weather", arguments="{")]),
    pb.Tokens(index=2, token_ids=[7], tool_calls=[pb.ToolCallPart(arguments="}")]),
    pb.Tokens(index=3, token_ids=[8], tool_calls=[pb.ToolCallPart(index=1, id="b2", name="time")]),
]


async def answer(head: Any, start: Any) -> None:
    """Replies with ``CALLED``, and ends."""
    said = [SequenceTokens(sequence_id=start.sequence_id, tokens=each) for each in CALLED]
    end = finished(start.sequence_id, start.request_id, 4)
    end.receipt.finish_reason = pb.FINISH_REASON_EOS
    await head.report(StepReport(tokens=said, finished=[end]))


async def goes_on(head: Any, asking: asyncio.Task[Any]) -> None:
    """The turn behind ``CALLED`` and a result finds the conversation, however its calls are written."""
    start = await head.started()
    assert start.session_id
    # The turn's own ids, and then those of what came behind it.
    assert list(start.prompt_ids)[-4:] == [0, *(ord(each) % 100 for each in "in.;")][1:]
    assert 8 in start.prompt_ids
    assert not start.HasField("calls")
    await answer(head, start)
    await asking


def test_a_call_and_what_follows_from_it() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head, at.openai() as client:
            chat = client.chat.completions
            asking = asyncio.create_task(
                chat.create(model="toy", messages=ASKED, tools=[WEATHER, TIME], parallel_tool_calls=True)
            )
            start = await head.started()
            assert (start.calls.form, list(start.calls.names)) == ("hermes", ["weather", "time"])
            assert not start.calls.single
            assert not start.HasField("constraint")
            await answer(head, start)
            (choice,) = (await asking).choices
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Hm.")
            calls = choice.message.tool_calls
            assert [(each.id, each.type, each.function.name) for each in calls] == [
                ("a1", "function", "weather"),
                ("b2", "function", "time"),
            ]
            assert calls[0].function.arguments == "{}"
            result = {"role": "tool", "tool_call_id": "a1", "content": "Rain."}
            later = [*ASKED, choice.message.model_dump(exclude_none=True), result]
            asking = asyncio.create_task(
                chat.create(model="toy", messages=later, tools=[WEATHER, TIME], tool_choice="none")
            )
            await goes_on(head, asking)

    run(scenario)


def test_calls_are_streamed_as_openai_streams_them() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head, at.openai() as client:
            stream = asyncio.create_task(
                client.chat.completions.create(model="toy", messages=ASKED, tools=[WEATHER], stream=True)
            )
            await answer(head, await head.started())
            chunks = [chunk async for chunk in await stream]
            deltas = [chunk.choices[0].delta for chunk in chunks]
            parts = [part for delta in deltas for part in delta.tool_calls or ()]
            assert {part.index for part in parts} == {0, 1}
            assert [part.function.name for part in parts if part.function.name] == ["weather", "time"]
            assert "".join(part.function.arguments for part in parts if part.index == 0) == "{}"
            assert "".join(delta.content or "" for delta in deltas) == "Hm."
            assert chunks[-1].choices[0].finish_reason == "tool_calls"

    run(scenario)


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ["weather", "time"]), ({"type": "function", "function": {"name": "time"}}, ["time"])],
)
def test_a_reply_that_must_call_is_held_to_it(choice: Any, names: list[str]) -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head, at.openai() as client:
            asking = asyncio.create_task(
                client.chat.completions.create(
                    model="toy",
                    messages=ASKED,
                    tools=[WEATHER, TIME],
                    tool_choice=choice,
                    parallel_tool_calls=False,
                )
            )
            start = await head.started()
            assert list(start.calls.names) == names
            assert start.calls.single
            assert start.constraint.kind == "grammar"
            assert [f'"const": "{name}"' in start.constraint.text for name in names] == [True] * len(names)
            asking.cancel()
            await head.cancelled()

    run(scenario)


def flat(tool: Any) -> Any:
    """A tool as /v1/responses has it."""
    return {"type": "function"} | tool["function"]


def test_a_response_calls_and_goes_on() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head, at.openai() as client:
            tools = [flat(WEATHER), flat(TIME)]
            asking = asyncio.create_task(client.responses.create(model="toy", input=ASKED, tools=tools))
            start = await head.started()
            assert (start.calls.form, list(start.calls.names)) == ("hermes", ["weather", "time"])
            assert not start.calls.single
            await answer(head, start)
            reply = await asking
            assert (reply.status, reply.output_text) == ("completed", "Hm.")
            assert (reply.tool_choice, reply.parallel_tool_calls) == ("auto", True)
            assert [tool.name for tool in reply.tools] == ["weather", "time"]
            said, *calls = reply.output
            assert (said.type, said.status) == ("message", "completed")
            assert [(each.call_id, each.name, each.arguments) for each in calls] == [
                ("a1", "weather", "{}"),
                ("b2", "time", ""),
            ]
            assert {each.type for each in calls} == {"function_call"}
            assert len({each.id for each in reply.output}) == 3
            result = {"type": "function_call_output", "call_id": "a1", "output": "Rain."}
            later = [*ASKED, *reply.output, result]
            asking = asyncio.create_task(
                client.responses.create(model="toy", input=later, tools=tools, tool_choice="none")
            )
            await goes_on(head, asking)

    run(scenario)


def test_calls_of_a_response_are_streamed_as_openai_streams_them() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head, at.openai() as client:

            async def listen() -> tuple[list[Any], Any]:
                async with client.responses.stream(
                    model="toy", input=ASKED, tools=[flat(WEATHER), flat(TIME)]
                ) as stream:
                    return [event async for event in stream], await stream.get_final_response()

            listening = asyncio.create_task(listen())
            await answer(head, await head.started())
            events, final = await listening
            assert [event.sequence_number for event in events] == list(range(len(events)))
            added = [event for event in events if event.type == "response.output_item.added"]
            assert [(each.output_index, each.item.type) for each in added] == [
                (0, "message"),
                (1, "function_call"),
                (2, "function_call"),
            ]
            deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
            assert {event.item_id for event in deltas} == {added[1].item.id}
            assert "".join(event.delta for event in deltas) == "{}"
            done = [event for event in events if event.type == "response.function_call_arguments.done"]
            assert [(each.output_index, each.arguments) for each in done] == [(1, "{}"), (2, "")]
            assert events[-1].type == "response.completed"
            assert [item.type for item in final.output] == ["message", "function_call", "function_call"]
            assert final.output[1].arguments == "{}"

    run(scenario)


def test_a_response_that_calls_alone_has_no_message() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head, at.openai() as client:
            asking = asyncio.create_task(
                client.responses.create(
                    model="toy",
                    input="Weather?",
                    tools=[flat(WEATHER), flat(TIME)],
                    tool_choice={"type": "function", "name": "weather"},
                    parallel_tool_calls=False,
                    include=["message.output_text.logprobs"],
                )
            )
            start = await head.started()
            assert (list(start.calls.names), start.calls.single) == (["weather"], True)
            assert '"const": "weather"' in start.constraint.text
            part = pb.ToolCallPart(id="a1", name="weather", arguments="{")
            new = pb.Tokens(
                token_ids=[5, 6], tool_calls=[part], logprobs=[pb.TokenLogprob(logprob=-1.0)] * 2
            )
            said = SequenceTokens(sequence_id=start.sequence_id, tokens=new)
            await head.report(
                StepReport(tokens=[said], finished=[finished(start.sequence_id, start.request_id, 2)])
            )
            reply = await asking
            (call,) = reply.output
            assert (call.name, call.arguments, call.status) == ("weather", "{", "incomplete")
            assert (reply.status, reply.tool_choice.name) == ("incomplete", "weather")
            assert reply.parallel_tool_calls is False

    run(scenario)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type is 'web_search'"),
        ({"tools": [TIME]}, "tools.0.name is missing"),
        ({"tools": [flat(TIME)], "tool_choice": "weather"}, "tool_choice is 'weather'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "'item_reference'"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "call_id is missing"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "type is 'input_image'"),
    ],
)
def test_bad_input_of_a_response_names_the_value(extra: dict[str, Any], said: str) -> None:
    async def scenario() -> None:
        async with site() as at, at.openai() as client:
            with pytest.raises(openai.BadRequestError, match=said):
                await client.responses.create(model="toy", input="Weather?", extra_body=extra)

    run(scenario)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"tools": [TIME], "tool_choice": "weather"}, "tool_choice is 'weather'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [TIME, TIME]}, "tool name 'time'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tool name 'a b'"),
        ({"tools": [{"type": "search"}]}, "tools.0.type"),
        ({"tools": [TIME] * 129}, "there are 129 tools"),
        (
            {"tools": [TIME], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice asks for calls",
        ),
        ({"add_generation_prompt": False}, "add_generation_prompt is false"),
    ],
)
def test_bad_input_names_the_value(extra: dict[str, Any], said: str) -> None:
    async def scenario() -> None:
        async with site() as at, at.openai() as client:
            with pytest.raises(openai.BadRequestError, match=said):
                await client.chat.completions.create(model="toy", messages=ASKED, extra_body=extra)

    run(scenario)


def test_the_sdk_has_them_too() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head:
            tools: list[Any] = [WEATHER, Tool("time", "Now.")]
            asking = asyncio.create_task(at.client.chat(ASKED, tools=tools))
            start = await head.started()
            assert list(start.calls.names) == ["weather", "time"]
            await answer(head, start)
            reply = await asking
            assert reply.text == "Hm."
            assert reply.tool_calls == (ToolCall("a1", "weather", "{}"), ToolCall("b2", "time", ""))
            for options, said in (
                ({"tools": [{"name": "time"}]}, "a tool is"),
                ({"tools": [WEATHER], "tool_choice": "tim"}, "tool_choice is 'tim'"),
            ):
                with pytest.raises(InvalidRequestError, match=said):
                    await at.client.chat(ASKED, **options)
            with pytest.raises(InvalidRequestError, match="need a conversation"):
                await at.client.generate("text", tools=[WEATHER])

    run(scenario)


def test_what_is_no_message_is_refused() -> None:
    async def refused(at: Site, chat: pb.ChatPrompt, said: str) -> None:
        call = at.client._stub.Generate(pb.GenerateRequest(request_id="r", chat=chat))
        with pytest.raises(Exception, match=said):
            await call.read()

    async def scenario() -> None:
        async with site() as at:
            user = pb.ChatMessage(role="user", content="a", tool_calls=[pb.ToolCall(name="f")])
            await refused(at, pb.ChatPrompt(messages=[user]), "only the assistant's")
            asked = [pb.ChatMessage(role="user", content="a")]
            for parameters, said in (("[1]", "give the JSON schema"), ("{", "are no JSON")):
                tool = pb.Tool(name="f", parameters=parameters)
                await refused(at, pb.ChatPrompt(messages=asked, tools=[tool]), said)

    run(scenario)
