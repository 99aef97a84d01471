"""A request that cannot run is refused by its value, with the way out; a sound one is completed."""

import math
from dataclasses import dataclass, field, replace

import pytest

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Sampling, Stopping
from workers.model.shapes import SHAPES
from workers.schedule.validation import Terms, lowered, settle

MODEL = replace(
    SHAPES["toy"],
    layers=2,
    hidden=8,
    heads=2,
    kv_heads=1,
    head_size=4,
    intermediate=16,
    vocabulary=100,
    context=1000,
)


@dataclass(frozen=True)
class Asked:
    """What a client asks for."""

    prompt: tuple[int, ...] = (5, 6, 7)
    sampling: Sampling = field(default_factory=Sampling)
    stopping: Stopping = field(default_factory=Stopping)
    compression: Compression = field(default_factory=Compression)
    output: tuple[int, ...] = ()


def settled(asked: Asked) -> Terms:
    return settle(asked.prompt, asked.sampling, asked.stopping, asked.compression, asked.output, MODEL)


@pytest.mark.parametrize(
    ("asked", "value", "way_out"),
    [
        (Asked(prompt=()), "empty", "at least one token"),
        (Asked(prompt=(5, 100)), "token id 100 in prompt", "0 to 99"),
        (Asked(prompt=(-1,)), "token id -1 in prompt", "0 to 99"),
        (Asked(output=(3, 101)), "token id 101 in resume_output_ids", "0 to 99"),
        (Asked(prompt=(1,) * 1000), "1000 tokens", "context is 1000"),
        (Asked(sampling=Sampling(-0.1)), "temperature is -0.1", "0 or more"),
        (Asked(sampling=Sampling(math.nan)), "temperature is nan", "finite"),
        (Asked(sampling=Sampling(math.inf)), "temperature is inf", "finite"),
        (Asked(sampling=Sampling(top_p=0.0)), "top_p is 0.0", "(0, 1]"),
        (Asked(sampling=Sampling(top_p=1.1)), "top_p is 1.1", "(0, 1]"),
        (Asked(sampling=Sampling(top_p=math.nan)), "top_p is nan", "(0, 1]"),
        (Asked(sampling=Sampling(top_k=0)), "top_k is 0", "1 or more, or absent"),
        (Asked(stopping=Stopping(0)), "max_tokens is 0", "1 or more"),
        (Asked(stopping=Stopping(-3)), "max_tokens is -3", "1 or more"),
        (Asked(stopping=Stopping(998)), "max_tokens is 998", "room for 997"),
        (Asked(stopping=Stopping(stop=("x",) * 17)), "17 stop strings", "at most 16"),
        (Asked(stopping=Stopping(stop_token_ids=(2,) * 17)), "17 stop_token_ids", "at most 16"),
        (Asked(stopping=Stopping(stop_token_ids=(100,))), "token id 100 in stop_token_ids", "0 to 99"),
        (Asked(stopping=Stopping(stop=("",))), "'' has 0 characters", "1 to 256"),
        (Asked(stopping=Stopping(stop=("y" * 257,))), "257 characters", "1 to 256"),
        (Asked(compression=Compression("lru")), "'lru'", "full, local, streaming, pyramid"),
        (Asked(compression=Compression("pyramid", kv_keep=2.0)), "kv_keep is 2.0", "(0, 1]"),
        (Asked(stopping=Stopping(2), output=(4, 4, 4)), "3 tokens", "max_tokens 2"),
        (Asked(sampling=Sampling(0.5), output=(4,)), "resume_output_ids", "seed"),
    ],
)
def test_what_cannot_run_is_refused_with_the_way_out(asked: Asked, value: str, way_out: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        settled(asked)
    assert value in refused.value.message
    assert way_out in refused.value.message


@pytest.mark.parametrize(
    "asked",
    [
        Asked(prompt=(0, 99)),
        Asked(prompt=(1,) * 999, stopping=Stopping(1)),
        Asked(sampling=Sampling(1e-300, 1.0, 10_000, seed=0)),
        Asked(stopping=Stopping(997, ("z" * 256,) * 16, ignore_eos=True)),
        Asked(sampling=Sampling(0.5, seed=4), stopping=Stopping(2), output=(4, 4)),
        Asked(output=(4,)),
    ],
)
def test_what_is_given_is_kept(asked: Asked) -> None:
    terms = settled(asked)
    assert terms.sampling.temperature == asked.sampling.temperature
    assert asked.sampling.seed in (None, terms.sampling.seed)
    assert asked.stopping.max_tokens in (None, terms.stopping.max_tokens)
    assert terms.stopping.stop == asked.stopping.stop


@pytest.mark.parametrize(("prompt_tokens", "max_tokens"), [(3, 997), (900, 100), (999, 1)])
def test_the_output_that_fits_is_the_default(prompt_tokens: int, max_tokens: int) -> None:
    assert settled(Asked((1,) * prompt_tokens)).stopping.max_tokens == max_tokens


def test_a_seed_is_picked_anew_for_each_request_without_one() -> None:
    seeds = {settled(Asked(sampling=Sampling(1.0))).sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)


@dataclass(frozen=True)
class Limited:
    """A request that stops."""

    stopping: Stopping

    @property
    def max_tokens(self) -> int:
        assert self.stopping.max_tokens is not None
        return self.stopping.max_tokens


@pytest.mark.parametrize(
    ("room", "fits"), [(0, 1000), (1, 1), (2, 2), (613, 613), (999, 999), (1000, 1000), (2000, 1000)]
)
def test_a_length_is_lowered_to_what_fits_if_anything_does(room: int, fits: int) -> None:
    asked = Limited(Stopping(1000, stop="x"))
    less = lowered(asked, lambda each: each.max_tokens <= room)
    assert less == Limited(Stopping(fits, stop="x"))
