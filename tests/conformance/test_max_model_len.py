"""`max_model_len` is the context that is served, and what tables and workspace are made for."""

from collections.abc import Callable
from pathlib import Path

import pytest
from toy import CONTEXT

from pyramidserve.errors import ConfigurationError, InvalidRequestError
from pyramidserve.types import Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest


def engine(folder: Path, max_model_len: int = 0, boundaries: tuple[int, ...] = ()) -> Engine:
    return Engine(
        EngineConfig(str(folder), dtype="float32", max_model_len=max_model_len, boundaries=boundaries)
    )


def test_a_shorter_context_says_the_same_in_less_memory(toy: Callable[[str], Path]) -> None:
    whole, short = engine(toy("gqa")), engine(toy("gqa"), 64)
    request = EngineRequest(list(range(3, 53)), stopping=Stopping(14, ignore_eos=True))
    assert whole.generate([request])[0].token_ids == short.generate([request])[0].token_ids
    with pytest.raises(
        InvalidRequestError, match=r"max_tokens is 15.*50 tokens the context of 64 .*for 14"
    ):
        short.submit(EngineRequest(list(range(3, 53)), stopping=Stopping(15)))
    with pytest.raises(InvalidRequestError, match=r"prompt has 64 tokens; the model's context is 64"):
        short.submit(EngineRequest([5] * 64))
    own, all_of_it = (each.stages[0].cache.device.table_bytes for each in (short, whole))
    assert own < all_of_it / 3


def test_more_than_there_is_is_refused_naming_both(toy: Callable[[str], Path]) -> None:
    for wrong in (CONTEXT + 1, -1):
        with pytest.raises(
            ConfigurationError, match=rf"{wrong}, but .* has 6 layers, a context of {CONTEXT} .* of 259"
        ):
            engine(toy("gqa"), wrong)


@pytest.mark.parametrize("boundaries", [(1, 2, 3, 4, 5, 6), (2, 2), (0,), (3, 2)])
def test_more_shards_than_layers_are_refused_naming_both(
    boundaries: tuple[int, ...], toy: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigurationError, match=rf"for {len(boundaries) + 1} shards .* has 6 layers"):
        engine(toy("gqa"), boundaries=boundaries)
