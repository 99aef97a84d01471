"""What the blocking client sends, and what it refuses to send."""

from array import array
from collections.abc import Sequence

import numpy as np
import pytest
from google.protobuf.struct_pb2 import Struct
from scripted_inference import ScriptedInference, receipt

from pyramidserve import (
    ChatMessage,
    Client,
    Compression,
    InvalidRequestError,
    Prompt,
    Sampling,
    Stopping,
)
from pyramidserve.v1 import inference_pb2 as pb

pytest_plugins = ["scripted_fixtures"]


def test_chat_sends_the_conversation(client: Client, scripted: ScriptedInference) -> None:
    messages = [ChatMessage("system", "be brief"), ChatMessage("user", "hello")]
    assert client.chat(messages).text == "hello"
    sent = scripted.requests[0].chat.messages
    assert [(message.role, message.content) for message in sent] == [
        ("system", "be brief"),
        ("user", "hello"),
    ]


def test_all_options_reach_the_server(client: Client, scripted: ScriptedInference) -> None:
    client.generate(
        "word",
        sampling=Sampling(temperature=0.5, seed=3),
        stopping=Stopping(max_tokens=9, stop=("END",)),
        compression=Compression("streaming", parameters={"window": 8}),
        session_id="s",
        request_id="r",
        resume_output_ids=[100, 101],
    )
    parameters = Struct()
    parameters.update({"window": 8})
    assert scripted.requests == [
        pb.GenerateRequest(
            request_id="r",
            text="word",
            sampling=pb.Sampling(
                temperature=0.5,
                top_p=1.0,
                seed=3,
                min_p=0.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                repetition_penalty=1.0,
            ),
            stopping=pb.Stopping(max_tokens=9, stop=["END"]),
            compression=pb.Compression(
                policy="streaming",
                parameters=parameters,
                recall="off",
            ),
            session_id="s",
            resume_output_ids=[100, 101],
        )
    ]


def test_requests_are_named_apart_and_say_no_more_than_asked(
    client: Client, scripted: ScriptedInference
) -> None:
    for _ in range(2):
        stream = client.stream("word")
        list(stream)
        assert scripted.requests[-1] == pb.GenerateRequest(request_id=stream.request_id, text="word")
    assert scripted.requests[0].request_id != scripted.requests[1].request_id


def test_several_replies_are_requests_of_their_own(client: Client, scripted: ScriptedInference) -> None:
    asked = {"request_id": "r", "session_id": "s", "sampling": Sampling(1.0, seed=2**63 - 2)}
    replies = client.replies("two words", 3, **asked)  # type: ignore[arg-type]
    assert [reply.receipt.request_id for reply in replies] == ["r-0", "r-1", "r-2"]
    assert {reply.text for reply in replies} == {"two words"}
    sent = sorted(scripted.requests, key=lambda each: each.request_id)
    assert [(each.session_id, each.sampling.seed) for each in sent] == [
        ("s", 2**63 - 2),
        ("", 2**63 - 1),
        ("", 0),
    ]
    assert {(each.text, each.sampling.temperature) for each in sent} == {("two words", 1.0)}


def test_a_single_one_of_several_replies_is_the_same_request(
    client: Client, scripted: ScriptedInference
) -> None:
    client.generate("word", request_id="r", session_id="s")
    client.replies("word", 1, request_id="r", session_id="s")
    assert scripted.requests[0] == scripted.requests[1]


@pytest.mark.parametrize("n", [0, 129, 2.5])
def test_there_are_bounds_to_several_replies(client: Client, scripted: ScriptedInference, n: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"n must be a whole number from 1 to 128, not {n}"):
        client.streams("word", n)
    with pytest.raises(InvalidRequestError, match="n is 2, and resume_output_ids are of one reply"):
        client.replies("word", 2, resume_output_ids=[1])
    assert scripted.requests == []


@pytest.mark.parametrize("ids", [[], [0, 2**31 - 1]])
def test_token_ids_are_sent_as_they_are(
    client: Client, scripted: ScriptedInference, ids: Sequence[int]
) -> None:
    scripted.script = lambda request, context: iter([receipt(request.request_id, 0)])
    client.generate(ids)
    assert scripted.requests[0].WhichOneof("prompt") == "token_ids"
    assert scripted.requests[0].token_ids.ids == ids


@pytest.mark.parametrize(
    "ids", [np.array([1, 50]), [np.int64(1), np.uint8(50)], (1, 50), array("i", [1, 50])]
)
def test_token_ids_may_be_of_any_integer_type(
    client: Client, scripted: ScriptedInference, ids: Sequence[int]
) -> None:
    scripted.script = lambda request, context: iter([receipt(request.request_id, 0)])
    client.generate(ids)
    assert scripted.requests[0].token_ids.ids == [1, 50]


def test_messages_may_be_dictionaries(client: Client, scripted: ScriptedInference) -> None:
    client.chat([{"role": "system", "content": "be brief"}, ChatMessage("user", "hello")])
    sent = scripted.requests[0].chat.messages
    assert [(message.role, message.content) for message in sent] == [
        ("system", "be brief"),
        ("user", "hello"),
    ]


def test_a_stop_given_as_one_text_is_one(client: Client, scripted: ScriptedInference) -> None:
    client.generate("word", stopping=Stopping(stop="END"))
    assert scripted.requests[0].stopping.stop == ["END"]
    assert Stopping(stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([1, -1], "prompt .* not -1"),
        ([2**31], "prompt .* not 2147483648"),
        ([1.5], "prompt .* not 1.5"),
        ([ChatMessage("user", "hi"), 5], "item 0 of the prompt is a message, but not all are"),
        ([{"role": "user", "content": "hi", "name": "Ann"}], "a 'role' and a 'content'.* 'name': 'Ann'"),
        ([{"role": "user", "content": None}], "both of them text.*None"),
        ("\ud800", "surrogates"),
        (5, "wire"),
    ],
)
def test_prompts_that_do_not_fit_the_wire_are_named(
    client: Client, scripted: ScriptedInference, prompt: Prompt, words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        client.stream(prompt)
    assert scripted.requests == []


def test_options_that_do_not_fit_the_wire_are_named(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match=r"resume_output_ids .* not -2"):
        client.stream("word", resume_output_ids=[-2])
    with pytest.raises(InvalidRequestError, match=r"max_tokens .* not 4294967296"):
        client.stream("word", stopping=Stopping(max_tokens=2**32))
    with pytest.raises(InvalidRequestError, match="must be real number"):
        client.stream("word", sampling=Sampling(temperature="hot"))  # type: ignore[arg-type]


def test_options_that_do_not_exist_are_refused(client: Client) -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        client.stream("word", max_tokens=5)  # type: ignore[call-arg]


def test_requests_over_the_size_limit_are_not_sent(
    scripted_target: str, scripted: ScriptedInference
) -> None:
    with Client(scripted_target, max_message_bytes=1000) as client:
        with pytest.raises(InvalidRequestError) as caught:
            client.stream("x" * 1000, request_id="r")
        assert client.generate("x" * 900).text == "x" * 900
    size = pb.GenerateRequest(request_id="r", text="x" * 1000).ByteSize()
    assert f"{size} bytes and the limit is 1000" in caught.value.message
    assert "max_message_bytes" in caught.value.message
    assert caught.value.reason == "message_too_large"
    assert len(scripted.requests) == 1


def test_the_size_limit_of_the_server_is_named_too(scripted_target: str) -> None:
    # gRPC's own limit of 4 MiB, below the client's.
    with (
        Client(scripted_target) as client,
        pytest.raises(InvalidRequestError, match=r"vs\. 4194304"),
    ):
        client.generate("x" * 5 * 2**20)
