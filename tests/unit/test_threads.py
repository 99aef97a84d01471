"""What computes once must not keep its team of threads."""

import asyncio
import threading

from workers.shard import in_own_thread


def test_work_runs_in_a_thread_that_ends_with_it() -> None:
    thread = asyncio.run(in_own_thread(threading.current_thread))
    assert thread is not threading.main_thread()
    assert not thread.is_alive()
