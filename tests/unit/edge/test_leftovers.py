"""Groups of gangs that are gone are removed, and none of a gang that is about to have its actors."""

import asyncio
from collections.abc import Iterator

import pytest

from cluster.edge.leftovers import LOOK_SECONDS, clear_leftovers
from workers import ray_private


class OverError(Exception):
    """There is no more to look at."""


def removed(looks: list[set[str]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is removed where the groups that are empty are those of ``looks``, one after the other."""
    names: list[str] = []
    found: Iterator[set[str]] = iter(looks)
    left = len(looks)

    def empty_gangs(application: str) -> frozenset[str]:
        assert application == "chat"
        return frozenset(next(found))

    async def pause(seconds: float) -> None:
        nonlocal left
        assert seconds == LOOK_SECONDS
        if not left:
            raise OverError
        left -= 1

    monkeypatch.setattr(ray_private, "empty_gangs", empty_gangs)
    monkeypatch.setattr(ray_private, "remove_gang", names.append)
    with pytest.raises(OverError):
        asyncio.run(clear_leftovers("chat", pause))
    return names


def test_a_group_that_is_empty_twice_in_a_row_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert removed([{"a", "new"}, {"a"}, {"b"}, set(), {"b"}], monkeypatch) == ["a"]
    assert removed([{"b", "a"}, {"a", "b"}, set()], monkeypatch) == ["a", "b"]
    assert removed([set(), set()], monkeypatch) == []
