"""Placement groups of gangs that are gone, which reserve their CPUs and GPUs for nobody.

Serve takes such away when its controller starts anew, but asks a dashboard for them, which not every Ray
cluster has. So one of a gang that died while the controller was dead would stay.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from workers import ray_private
from workers.events import tell

logger = logging.getLogger(__name__)
# A gang has its group for a moment before it has its actors: those that are empty twice are left over.
LOOK_SECONDS = 15.0


async def clear_leftovers(
    application: str, pause: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Looks every LOOK_SECONDS for groups of an application that are empty again, and removes them."""
    empty: frozenset[str] = frozenset()
    while True:
        await pause(LOOK_SECONDS)
        before, empty = empty, await asyncio.to_thread(ray_private.empty_gangs, application)
        for name in sorted(before & empty):
            await asyncio.to_thread(ray_private.remove_gang, name)
            tell(logger, logging.WARNING, "placement_group_removed", name=name)
