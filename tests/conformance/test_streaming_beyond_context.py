"""`streaming` goes on beyond the model's context: it says what plain lines say with a cache that is cut."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import CONTEXT, MARGIN
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Sampling, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.engine.loop import SequenceFinished, SequenceTokens
from workers.kv.rows import decode, encode
from workers.policies.capacity import CHUNK
from workers.schedule.validation import LONGEST_SEQUENCE

SINKS, WINDOW = 3, 50
HELD = SINKS + WINDOW
STREAMING = Compression("streaming", parameters={"sinks": SINKS, "window": WINDOW})


class CutCache:
    """Keys of every layer as they are before their rotation, and values, of the tokens that are there."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.layers = model, [[torch.zeros(0)] * 2 for _ in model.model.layers]

    def feed(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits behind the last of ``ids``, whose places follow those of what is in the cache."""
        hidden = self.model.model.embed_tokens(torch.tensor([ids]))
        for layer, held in zip(self.model.model.layers, self.layers, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            query, key, value = (
                project(normed).view(1, len(ids), -1, attention.head_dim).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if held[0].numel():
                key, value = torch.cat((held[0], key), 2), torch.cat((held[1], value), 2)
            held[:] = key, value
            places = torch.arange(key.shape[2])
            if getattr(attention, "use_rope", True):
                cos, sin = self.model.model.rotary_emb(hidden, places[None])
                padded = torch.nn.functional.pad(query, (0, 0, key.shape[2] - len(ids), 0))
                query, key = apply_rotary_pos_emb(padded, key, cos, sin)
                query = query[:, :, -len(ids) :]
            distance = places[-len(ids) :, None] - places
            reach = getattr(attention, "sliding_window", None) or len(places)
            key, value = (repeat_kv(each, attention.num_key_value_groups) for each in (key, value))
            logits = query @ key.transpose(2, 3) * attention.head_dim**-0.5
            logits.masked_fill_((distance < 0) | (distance >= reach), float("-inf"))
            attended = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
            hidden = hidden + attention.o_proj(attended)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        behind: torch.Tensor = self.model.lm_head(self.model.model.norm(hidden))[0, -1]
        return behind

    def cut(self, sinks: int, most: int) -> None:
        """Leaves the first ``sinks`` tokens and the latest, ``most`` in all."""
        for held in self.layers:
            count = held[0].shape[2]
            if count > most:
                stays = torch.tensor([*range(sinks), *range(count - most + sinks, count)])
                held[:] = (each.index_select(2, stays) for each in held)


class Plain:
    """A conversation with a model of transformers, in a cache that is cut to sinks and window."""

    def __init__(self, checkpoint: Path) -> None:
        self.cache = CutCache(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))

    def check(self, prompt: Sequence[int], said: Sequence[int]) -> None:
        """Asserts that each of ``said`` is the best behind those before it, but for near ties."""
        with torch.no_grad():
            logits = self.cache.feed(prompt)
            self.cache.cut(SINKS, HELD)
            for number, token in enumerate(said):
                assert logits.max() - logits[token] < MARGIN, number
                if number < len(said) - 1:  # the last is never fed
                    logits = self.cache.feed([token])
                    if self.cache.layers[0][0].shape[2] == HELD + CHUNK:
                        self.cache.cut(SINKS, HELD)


def some(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 259) for _ in range(count)]


def ask(
    ids: Sequence[int], tokens: int, compression: Compression = STREAMING, session: str = ""
) -> EngineRequest:
    stopping = Stopping(max_tokens=tokens, ignore_eos=True)
    return EngineRequest(list(ids), stopping=stopping, compression=compression, session_id=session)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("prompt", [2, 30, 100])
def test_a_stream_says_what_plain_lines_say(
    prompt: int, shards: int, toy_engine: Callable[..., Engine], toy: Callable[[str], Path]
) -> None:
    engine, ids = toy_engine(shards=shards), some(prompt)
    (reply,) = engine.generate([ask(ids, 2 * CONTEXT)])
    assert reply.receipt.output_tokens == 2 * CONTEXT
    Plain(toy("gqa")).check(ids, reply.token_ids)
    for layer in reply.receipt.layers:
        held = layer.prompt_kept + layer.generated_kept
        assert HELD <= held < HELD + CHUNK
        # Of what is too long for any turn to attend to, nothing is on the host.
        assert (layer.spilled, layer.dropped) == (0, prompt + 2 * CONTEXT - 1 - held)
    engine.check_integrity()


@pytest.mark.parametrize(
    "kind", ["linear", "dynamic", "llama3", "yarn", "longrope", "codellama", "smollm3", "mistral-window"]
)
def test_any_rotation_is_that_of_the_place_in_the_cache(
    kind: str, toy_engine: Callable[..., Engine], toy: Callable[[str], Path]
) -> None:
    engine, ids = toy_engine(kind), some(60)
    (reply,) = engine.generate([ask(ids, engine.model.context + 40)])
    Plain(toy(kind)).check(ids, reply.token_ids)


def test_turns_go_on_with_what_is_in_the_cache_beyond_the_context(
    toy_engine: Callable[..., Engine], toy: Callable[[str], Path]
) -> None:
    engine, plain, ids, left = toy_engine(shards=2), Plain(toy("gqa")), some(80), 0
    for tokens, new in ((90, 40), (150, 3), (60, 9), (20, 1)):
        (reply,) = engine.generate([ask(ids, tokens, session="s")])
        assert reply.receipt.reused_tokens == left
        plain.check(ids[left:], reply.token_ids)
        left = len(ids) + tokens - 1
        ids = [*ids, *reply.token_ids, *some(new, tokens)]
    assert len(ids) > CONTEXT
    engine.end_session("s")
    engine.check_integrity()


def test_a_prompt_beyond_the_context_is_read_at_both_ends(
    toy_engine: Callable[..., Engine], toy: Callable[[str], Path]
) -> None:
    engine, ids = toy_engine(shards=2), some(3 * CONTEXT)
    (reply,) = engine.generate([ask(ids, 100)])
    Plain(toy("gqa")).check([*ids[:SINKS], *ids[SINKS - CONTEXT :]], reply.token_ids)
    assert {layer.dropped for layer in reply.receipt.layers} == {3 * CONTEXT + 99 - HELD - 99 % CHUNK}


@pytest.mark.parametrize("host_bytes", [8 << 20, 0], ids=["to the host", "computed again"])
def test_streams_beyond_the_context_make_room_for_others_and_go_on(
    host_bytes: int, toy: Callable[[str], Path]
) -> None:
    engine = Engine(
        EngineConfig(
            str(toy("gqa")), dtype="float32", boundaries=(2,), kv_bytes=150 << 10, host_bytes=host_bytes
        )
    )
    wanted = [ask(some(20, seed), CONTEXT + 30) for seed in range(4)]
    alone = [engine.generate([each])[0].token_ids for each in wanted]
    for each in wanted:
        engine.submit(each)
        assert engine.loop.admit(engine._waiting.popleft())
    preempted, told = 0, dict[int, tuple[int, ...]]()
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, SequenceTokens):
                told[event.sequence] = (*told.get(event.sequence, ()), *event.tokens.token_ids)
            elif isinstance(event, SequenceFinished):
                preempted += event.receipt.preemptions
        engine.check_integrity()
    assert list(told.values()) == alone
    assert preempted > 0


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "int4"])
def test_in_few_bits_the_sinks_are_what_was_first_stored(
    kv_dtype: str, toy_engine: Callable[..., Engine]
) -> None:
    """However often they have moved: as one rotation of that, and not one of another."""
    engine, prompt = toy_engine(kv_dtype=kv_dtype), some(30)
    engine.submit(ask(prompt, CONTEXT + 200))
    (stage,) = engine.stages
    cache, first, moves = stage.cache, list[torch.Tensor](), set[int]()
    while not engine.idle:
        engine.step()
        for key, entry in cache._sequences.items():
            rows = [cache.device.read_first_keys(key, np.array([layer]), SINKS) for layer in range(6)]
            first = first or rows
            distance = int(entry.moved[0])
            for layer, own in enumerate(rows):
                far = np.full(SINKS, distance)
                turned = stage._rope.turned(decode(first[layer])[0], far, CONTEXT)
                wanted = encode(turned, own.dtype)[None] if distance else first[layer]
                assert torch.equal(own, wanted)
            moves.add(distance)
    assert len(moves) > 20


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_in_few_bits_a_text_is_as_likely_as_in_many(
    kv_dtype: str, toy_engine: Callable[..., Engine]
) -> None:
    losses, text = [], some(CONTEXT + 60)
    for stored in ("auto", kv_dtype):
        request = replace(
            ask(text[:40], len(text) - 40), given_output_ids=tuple(text[40:]), sampling=Sampling(logprobs=0)
        )
        (reply,) = toy_engine(kv_dtype=stored).generate([request])
        losses.append(-sum(each.logprob for each in reply.logprobs) / len(reply.logprobs))
    assert losses[0] == pytest.approx(losses[1], rel=0.01 if kv_dtype == "int8" else 0.1)


@pytest.mark.parametrize(
    ("compression", "prompt", "tokens", "why"),
    [
        (
            Compression(),
            50,
            CONTEXT,
            rf"behind a prompt of 50 tokens the context of {CONTEXT} has room for 206$",
        ),
        (Compression("local"), CONTEXT, 1, rf"model's context is {CONTEXT}, so at most one less fits$"),
        (replace(STREAMING, recall="exact"), 50, CONTEXT, r"has room for 206$"),
        (replace(STREAMING, recall="step"), CONTEXT, 1, r"at most one less fits$"),
        (replace(STREAMING, recall="turn"), CONTEXT, 1, r"'streaming' goes beyond it with recall 'off'$"),
        (
            Compression("streaming"),
            50,
            CONTEXT,
            r"206; policy 'streaming' goes beyond it where layers hold at most as many, and they hold 1040",
        ),
        (Compression("streaming", kv_keep=0.9), CONTEXT + 50, 1, r"and they hold 291: ask for fewer$"),
        (
            STREAMING,
            50,
            LONGEST_SEQUENCE,
            rf"a sequence of {LONGEST_SEQUENCE} has room for {LONGEST_SEQUENCE - 50}$",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    compression: Compression, prompt: int, tokens: int, why: str, toy_engine: Callable[..., Engine]
) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        toy_engine().submit(ask([5] * prompt, tokens, compression))


def test_what_is_silent_about_its_length_gets_what_the_context_has_beside_it(
    toy_engine: Callable[..., Engine],
) -> None:
    engine = toy_engine()
    for prompt, tokens in ((20, CONTEXT - 20), (3 * CONTEXT, CONTEXT - HELD)):
        request = EngineRequest([5] * prompt, stopping=Stopping(ignore_eos=True), compression=STREAMING)
        (reply,) = engine.generate([request])
        assert reply.receipt.output_tokens == tokens
