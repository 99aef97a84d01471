"""Output that is held to a schema, an expression or a grammar is one, however it comes about."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validate  # type: ignore[import-untyped]

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Constraint, FinishReason, Sampling, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.schedule import validation

POLICIES = {
    "full": Compression(),
    "evict": Compression("pyramid", "evict", kv_keep=0.6),
    "exact": Compression("pyramid", "evict", kv_keep=0.6, recall="exact"),
    "h2o": Compression("h2o", parameters={"tokens": 40, "drop": 4}),
}
PROMPT = [random.Random(1).randrange(3, 259) for _ in range(50)]
CODE = Constraint("regex", r"[a-f]{3}-[0-9]{2,4}(, (red|green))*\.")
LIST = Constraint("grammar", 'start: item (";" item)*\nitem: /[xyz]{1,5}/ "=" /[0-9]{1,3}/')


def schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """Some JSON schema; its values have few hundred characters at most."""
    kinds = ["integer", "boolean", "enum", "string"] + ["object", "array"] * (depth < 1)
    match draw.choice(kinds):
        case "integer":
            return {"type": "integer", "minimum": 0, "maximum": draw.randrange(1, 1000)}
        case "boolean":
            return {"type": "boolean"}
        case "enum":
            return {"enum": draw.sample(["red", "green", "blue", 1, None], 3)}
        case "string":
            return {"type": "string", "maxLength": draw.randrange(1, 20)}
        case "array":
            items = schema(draw, depth + 1)
            return {"type": "array", "items": items, "minItems": 1, "maxItems": draw.randrange(1, 4)}
    names = draw.sample("abcdefgh", draw.randrange(1, 4))
    return {
        "type": "object",
        "properties": {name: schema(draw, depth + 1) for name in names},
        "required": names,
        "additionalProperties": False,
    }


def held(draw: random.Random, number: int) -> tuple[EngineRequest, dict[str, Any]]:
    """A request that is held to some schema, greedy or drawn."""
    wanted = schema(draw) | {"title": f"schema {number}"}
    sampling = Sampling(1.5, seed=number) if number % 2 else Sampling()
    compression = list(POLICIES.values())[number % len(POLICIES)]
    constraint = Constraint("json_schema", json.dumps(wanted))
    request = EngineRequest(PROMPT[: 20 + number % 30], sampling, Stopping(), compression)
    return replace(request, constraint=constraint), wanted


def test_replies_to_200_schemas_fit_them_through_preemption_and_replay(
    toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Most are longer than is expected, so that some make room for others.
    monkeypatch.setattr(validation, "EXPECTED_TOKENS", 4)
    draw = random.Random(0)
    engine = Engine(EngineConfig(str(toy("gqa")), dtype="float32", kv_bytes=448 << 10, max_sequences=24))
    asked = [held(draw, number) for number in range(200)]
    replies = engine.generate([each for each, _ in asked])
    for reply, (_, wanted) in zip(replies, asked, strict=True):
        assert reply.receipt.finish_reason is FinishReason.EOS, reply.text
        validate(json.loads(reply.text), wanted)
    assert sum(each.receipt.preemptions for each in replies) > 0
    known = [reply.token_ids[: draw.randrange(1, len(reply.token_ids))] for reply in replies]
    cut = [replace(each, resume_output_ids=ids) for (each, _), ids in zip(asked, known, strict=True)]
    for rest, ids, whole in zip(engine.generate(cut), known, replies, strict=True):
        assert ids + rest.token_ids == whole.token_ids
    engine.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_reply_goes_on_as_it_would_have(
    policy: str, temperature: float, toy_engine: Callable[..., Engine]
) -> None:
    engine = toy_engine(shards=2)
    whole = EngineRequest(
        PROMPT, Sampling(temperature, seed=4), Stopping(60), POLICIES[policy], constraint=CODE
    )
    (reply,) = engine.generate([whole])
    assert re.fullmatch(CODE.text, reply.text) or reply.receipt.finish_reason is FinishReason.LENGTH
    for known in (1, 4, len(reply.token_ids) - 1):
        (rest,) = engine.generate([replace(whole, resume_output_ids=reply.token_ids[:known])])
        assert rest.token_ids == reply.token_ids[known:]


def test_sequences_that_make_room_go_on_in_their_grammars(
    toy: Callable[[str], Path], toy_engine: Callable[..., Engine]
) -> None:
    letters = Constraint("regex", "([a-f]{3} [0-9]{2} ){17}")  # 119 characters
    asked = [
        EngineRequest(PROMPT[number:], Sampling(1.0, seed=number), Stopping(120), constraint=letters)
        for number in range(16)
    ]
    roomy = toy_engine().generate(asked)
    config = EngineConfig(str(toy("gqa")), dtype="float32", kv_bytes=640 << 10, max_sequences=16)
    tight = Engine(config)
    replies = tight.generate(asked)
    assert sum(each.receipt.preemptions for each in replies) > 0
    assert [each.token_ids for each in replies] == [each.token_ids for each in roomy]
    assert all(re.fullmatch(letters.text, each.text) for each in replies)


def test_a_grammar_of_ones_own(toy_engine: Callable[..., Engine]) -> None:
    request = EngineRequest(PROMPT, Sampling(1.0, seed=2), Stopping(120), constraint=LIST)
    (reply,) = toy_engine(shards=2).generate([request])
    assert re.match(r"[xyz]{1,5}=[0-9]{1,3}(;[xyz]{1,5}=[0-9]{1,3})*", reply.text)


def test_with_min_tokens_the_end_of_a_grammar_is_still_its_end(toy_engine: Callable[..., Engine]) -> None:
    short = Constraint("regex", "(ab|cd)")
    request = EngineRequest(PROMPT, stopping=Stopping(20, min_tokens=10), constraint=short)
    (reply,) = toy_engine().generate([request])
    assert reply.text in ("ab", "cd")


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (Constraint("json_schema", '{"type": "objct"}'), "objct"),
        (Constraint("json_schema", "{"), "json_schema that cannot be"),
        (Constraint("regex", "(a"), "unclosed group"),
        (Constraint("grammar", "start: nothing"), "unknown name"),
        (Constraint("poem", "x"), "kind is 'poem'"),
        (Constraint("regex", "a" * 70_000), "at most 65536"),
    ],
)
def test_what_is_no_grammar_is_refused(
    constraint: Constraint, says: str, toy_engine: Callable[..., Engine]
) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        toy_engine().submit(EngineRequest(PROMPT, constraint=constraint))


def test_output_that_does_not_fit_is_no_beginning(toy_engine: Callable[..., Engine]) -> None:
    request = EngineRequest(PROMPT, constraint=CODE, resume_output_ids=(3, 3, 3))
    with pytest.raises(InvalidRequestError, match="do not fit the constraint from number 0 on"):
        toy_engine().submit(request)
