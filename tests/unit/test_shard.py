"""A shard that has been told to go is not one that Serve can count on."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from workers.shard import Shard


def test_a_shard_that_has_been_told_to_go_is_not_healthy() -> None:
    # No shard itself: nobody would await what Python calls when that is gone.
    shard: Any = SimpleNamespace(_runner=None, _head=None, _leases=[], _tasks=[])
    shard._leaves = shard._forgotten = False
    Shard.check_health(shard)
    Shard.check_health(shard)
    asyncio.run(Shard.__del__(shard))
    Shard.check_health(shard)  # as Serve takes stock
    with pytest.raises(RuntimeError, match="told to go"):
        Shard.check_health(shard)
