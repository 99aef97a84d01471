"""Follows the events of this node's replicas, as `pyramidserve serve --log-level` shows them."""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from workers import ray_private
from workers.event_file import SUFFIX
from workers.events import write_to

POLL_SECONDS = 0.2


class EventTail:
    """What comes into the event files of a folder: whole lines, of a level and above."""

    def __init__(self, level: int, show: Callable[[str], None]) -> None:
        self._level, self._show = level, show
        # By inode: a file that is full goes on under another name.
        self._files: dict[int, BinaryIO] = {}

    def skip(self, folder: Path) -> None:
        """Takes what is there as seen."""
        self._open(folder)
        for file in self._files.values():
            file.seek(0, os.SEEK_END)

    def read(self, folder: Path) -> None:
        """Shows what is new."""
        there = self._open(folder)
        for inode, file in list(self._files.items()):
            while (line := file.readline()).endswith(b"\n"):
                if logging.getLevelNamesMapping()[json.loads(line)["level"]] >= self._level:
                    self._show(line.decode().rstrip())
            file.seek(-len(line), os.SEEK_CUR)  # one that is still being written
            if inode not in there:
                self._files.pop(inode).close()

    def close(self) -> None:
        """Lets go of all files."""
        for file in self._files.values():
            file.close()

    def _open(self, folder: Path) -> set[int]:
        """Opens what is new, and returns all that is there."""
        there = set()
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            file = path.open("rb")
            inode = os.fstat(file.fileno()).st_ino
            there.add(inode)
            if self._files.setdefault(inode, file) is not file:
                file.close()
        return there


@contextmanager
def events_shown(level: str, cluster_is_there: bool) -> Iterator[None]:
    """Shows events of ``level`` and above on stderr: this process's, and those of this node's replicas.

    ``cluster_is_there``: what has happened on it is left out.
    """
    number = logging.getLevelNamesMapping()[level]
    write_to(logging.StreamHandler(sys.stderr), number)
    over = threading.Event()
    thread = threading.Thread(target=_follow, args=(number, cluster_is_there, over), name="events")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _follow(level: int, skips: bool, over: threading.Event) -> None:
    tail = EventTail(level, lambda line: print(line, file=sys.stderr, flush=True))
    folder: Path | None = None
    last = False
    while not last:
        last = over.wait(POLL_SECONDS)
        if folder is None and (folder := ray_private.serve_logs()) and skips:
            tail.skip(folder)
        if folder is not None:
            tail.read(folder)
    tail.close()
