"""Where requests are validated and tokenised: beside the event loop, and fairly."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pyramidserve.errors import OverloadedError
from pyramidserve.wire.connection import MAX_MESSAGE_BYTES

Result = TypeVar("Result")

# Larger requests do not keep others waiting: so many bytes take about 40 ms.
SHORT_BYTES = 32 * 2**10
# That may wait for one tenant: several of the largest, or hundreds of long ones.
WAITING_BYTES = 8 * MAX_MESSAGE_BYTES
RETRY_DELAY = 1.0


class Reading:
    """Two threads, one of them for short requests. In each, tenants take turns, one request a turn."""

    def __init__(self) -> None:
        self._short, self._long = _Thread("short"), _Thread("long")
        self._waiting: Counter[str] = Counter()

    async def read(self, tenant: str, size: int, work: Callable[[], Result]) -> Result:
        """What ``work`` returns or raises for a request of ``size`` bytes.

        Raises OverloadedError where too much waits already of ``tenant``.
        """
        waiting = self._waiting[tenant]
        if waiting and waiting + size > WAITING_BYTES:
            whose = f" of tenant {tenant!r}" if tenant else ""
            raise OverloadedError(
                f"requests of {waiting} bytes{whose} wait to be tokenised, and {WAITING_BYTES} may; try "
                "again after the retry delay",
                retry_delay=RETRY_DELAY,
            )
        self._waiting[tenant] += size
        try:
            thread = self._short if size <= SHORT_BYTES else self._long
            return await thread.run(tenant, work)
        finally:
            self._waiting[tenant] -= size


class _Thread:
    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, name)
        # One of each tenant waits for the thread, and others behind it.
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def run(self, tenant: str, work: Callable[[], Result]) -> Result:
        async with self._turns[tenant]:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
