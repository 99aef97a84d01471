"""What the router makes of what clients ask for."""

import math

import pytest
from google.protobuf.struct_pb2 import Struct, Value
from letters import CONTEXT, FACTS, VOCABULARY, AnyGrammar, Letters

from cluster.admit.request import ValidatedRequest
from cluster.front.validation import validate_request
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from pyramidserve.v1 import inference_pb2 as pb
from workers.budget.span import Span

DEFAULT = Compression("pyramid", "evict", kv_keep=0.5)


def message(**fields: object) -> pb.GenerateRequest:
    """A sound request of three tokens, changed by ``fields``."""
    asked = pb.GenerateRequest(request_id="r", token_ids=pb.TokenIds(ids=[1, 2, 3]))
    asked.MergeFrom(pb.GenerateRequest(**fields))  # type: ignore[arg-type]
    return asked


def validated(asked: pb.GenerateRequest) -> ValidatedRequest:
    return validate_request(asked, None, Letters(), FACTS, DEFAULT, AnyGrammar())


def chat(*turns: tuple[str, str]) -> pb.ChatPrompt:
    return pb.ChatPrompt(messages=[pb.ChatMessage(role=role, content=content) for role, content in turns])


def going_on(*turns: tuple[str, str]) -> pb.ChatPrompt:
    return pb.ChatPrompt(messages=chat(*turns).messages, continue_final_message=True)


def continues(asked: pb.GenerateRequest) -> bool:
    chat = validated(asked).chat
    assert chat is not None
    return chat.continues


def test_what_is_left_open_is_settled() -> None:
    request = validated(message())
    assert request.prompt_ids == (1, 2, 3)
    assert (request.max_tokens, request.limited) == (CONTEXT - 3, False)
    assert request.compression == DEFAULT
    assert 0 <= request.seed < 2**63
    assert not request.seed_given
    assert request.seed != validated(message()).seed


def test_instructions_of_a_chat_are_found_where_a_floor_keeps_some_of_them() -> None:
    asked = chat(("system", "BE KIND."), ("user", "HI"), ("system", "IN RHYME."), ("user", "YO"))
    floor, other = (
        pb.Compression(policy="snapkv", kv_keep=0.5, parameters=Struct(fields=fields))
        for fields in ({"span_floor": Value(number_value=0.5)}, {})
    )
    request = validated(message(chat=asked, compression=floor))
    said = "".join(map(chr, request.prompt_ids))
    (leading, later), first = request.instructions, said.index("HI")
    assert leading == Span(0, first)
    assert said[later.first : later.end] == "IN RHYME."
    assert validated(message(chat=asked, compression=other)).instructions == ()
    assert validated(message(compression=floor)).instructions == ()


def test_the_default_length_is_what_is_left_of_the_context() -> None:
    request = validated(message(token_ids=pb.TokenIds(ids=[1] * (CONTEXT - 13))))
    assert request.max_tokens == 10


def test_what_is_asked_for_is_kept() -> None:
    request = validated(
        message(
            sampling=pb.Sampling(temperature=0.5, top_p=0.9, top_k=3, seed=-5),
            stopping=pb.Stopping(max_tokens=4, stop=["x"], ignore_eos=True),
            compression=pb.Compression(policy="full"),
            session_id="s",
            resume_output_ids=[4, 5],
        )
    )
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.5, 0.9, 3)
    assert request.seed == -5
    assert request.seed_given
    assert (request.max_tokens, request.stopping.stop, request.stopping.ignore_eos) == (4, ("x",), True)
    assert request.compression.policy == "full"
    assert (request.session_id, request.resume_output_ids) == ("s", (4, 5))


def test_text_and_chat_are_tokenised() -> None:
    assert validated(pb.GenerateRequest(request_id="r", text="ab")).prompt_ids == (0, 97, 98)
    conversation = pb.GenerateRequest(request_id="r", chat=chat(("user", "a")))
    assert validated(conversation).prompt_ids == tuple(Letters().encode("user:a;"))
    begun = pb.GenerateRequest(request_id="r", chat=going_on(("user", "a"), ("assistant", "b")))
    assert validated(begun).prompt_ids == tuple(Letters().encode("user:a;assistant:b"))
    assert continues(begun)
    begun.chat.ClearField("continue_final_message")
    assert continues(begun)
    begun.chat.continue_final_message = False
    assert validated(begun).prompt_ids == tuple(Letters().encode("user:a;assistant:b;"))
    assert not continues(begun)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"request_id": "r" * 129}, "129 characters"),
        ({"session_id": "s" * 129}, "129 characters"),
        ({"text": ""}, "text is empty"),
        ({"chat": chat()}, "chat has 0 messages"),
        ({"chat": chat(("user", "a"), ("wizard", "b"))}, "'wizard'"),
        ({"token_ids": pb.TokenIds(ids=[-1])}, "-1"),
        ({"token_ids": pb.TokenIds(ids=[VOCABULARY])}, f"{VOCABULARY} in prompt"),
        ({"token_ids": pb.TokenIds(ids=[1] * CONTEXT)}, f"context is {CONTEXT}"),
        ({"stopping": pb.Stopping(max_tokens=0)}, "max_tokens is 0"),
        ({"stopping": pb.Stopping(max_tokens=-3)}, "max_tokens is -3"),
        ({"stopping": pb.Stopping(max_tokens=CONTEXT - 2)}, f"room for {CONTEXT - 3}"),
        ({"stopping": pb.Stopping(stop=["x"] * 17)}, "17 stop strings"),
        ({"stopping": pb.Stopping(stop_token_ids=[1] * 17)}, "17 stop_token_ids"),
        ({"stopping": pb.Stopping(stop_token_ids=[3, VOCABULARY])}, f"{VOCABULARY} in stop_token_ids"),
        ({"chat": going_on(("assistant", "a"), ("user", "b"))}, "the last is the user's"),
        ({"stopping": pb.Stopping(stop=["x", ""])}, "''"),
        ({"stopping": pb.Stopping(stop=["x" * 257])}, "257"),
        ({"sampling": pb.Sampling(temperature=math.nan)}, "temperature is nan"),
        ({"sampling": pb.Sampling(temperature=math.inf)}, "temperature is inf"),
        ({"sampling": pb.Sampling(temperature=-0.5)}, "temperature is -0.5"),
        ({"sampling": pb.Sampling(top_p=0.0)}, "top_p is 0.0"),
        ({"sampling": pb.Sampling(top_p=1.5)}, "top_p is 1.5"),
        ({"sampling": pb.Sampling(top_p=math.nan)}, "top_p is nan"),
        ({"sampling": pb.Sampling(top_k=0)}, "top_k is 0"),
        ({"compression": pb.Compression(policy="zip")}, "'zip'"),
        ({"compression": pb.Compression(policy="pyramid", prefill="skip")}, "'skip'"),
        ({"compression": pb.Compression(kv_keep=0.0)}, "kv_keep is 0.0"),
        ({"compression": pb.Compression(kv_keep=math.nan)}, "kv_keep is nan"),
        ({"compression": pb.Compression(kv_bytes_keep=0.0)}, "kv_bytes_keep is 0.0"),
        ({"compression": pb.Compression(kv_keep=0.5, kv_bytes_keep=0.5)}, "kv_bytes_keep 0.5"),
        ({"resume_output_ids": [5, VOCABULARY]}, f"{VOCABULARY} in resume_output_ids"),
        ({"resume_output_ids": [5, 6, 7], "stopping": pb.Stopping(max_tokens=2)}, "3 tokens"),
        ({"resume_output_ids": [5], "sampling": pb.Sampling(temperature=0.5)}, "seed"),
    ],
)
def test_a_bad_value_is_named(fields: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        validated(message(**fields))
    assert named in refused.value.message


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (pb.GenerateRequest(text="a"), "request_id ''"),
        (pb.GenerateRequest(request_id="r"), "no prompt"),
        (pb.GenerateRequest(request_id="r", token_ids=pb.TokenIds()), "prompt is empty"),
    ],
)
def test_what_is_missing_is_named(asked: pb.GenerateRequest, named: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        validated(asked)
    assert named in refused.value.message


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        validated(message(chat=chat(("x" * 100_000, "a"))))
    assert len(refused.value.message) < 200


def test_a_greedy_reply_resumes_without_its_seed() -> None:
    assert validated(message(resume_output_ids=[5])).resume_output_ids == (5,)


def test_the_same_reply_is_asked_for_whatever_the_client_has_of_it() -> None:
    live = validated(message(stopping=pb.Stopping(max_tokens=256)))
    assert validated(message(resume_output_ids=[5])).same_reply(live)
    assert validated(message(sampling=pb.Sampling(seed=live.seed))).same_reply(live)


@pytest.mark.parametrize(
    "fields",
    [
        {"token_ids": pb.TokenIds(ids=[4])},
        {"sampling": pb.Sampling(temperature=0.5)},
        {"stopping": pb.Stopping(max_tokens=9)},
        {"compression": pb.Compression(policy="full")},
        {"session_id": "s"},
    ],
)
def test_other_content_is_another_reply(fields: dict[str, object]) -> None:
    assert not validated(message(**fields)).same_reply(validated(message()))


def test_another_seed_is_another_reply() -> None:
    live = validated(message(sampling=pb.Sampling(seed=1)))
    assert not validated(message(sampling=pb.Sampling(seed=2))).same_reply(live)
