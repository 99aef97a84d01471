"""Events: a name and facts on the standard loggers, a line of JSON in a cluster."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.deploy.event_tail import EventTail
from workers.event_file import SUFFIX, EventFile
from workers.events import PACKAGES, EventFormatter, tell, write_to

log = logging.getLogger("workers.test_events")


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What a process writes of its events, at INFO."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    write_to(handler, logging.INFO, pipeline="g", rank=1)
    yield stream
    for package in PACKAGES:
        logging.getLogger(package).removeHandler(handler)
        logging.getLogger(package).setLevel(logging.NOTSET)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_a_line_of_json_that_says_when_what_and_where(written: io.StringIO) -> None:
    tell(log, logging.WARNING, "kernels_chosen", backend="cpu", reason='a "word"\nof 100 %s')
    (line,) = lines(written)
    assert list(line)[:3] == ["time", "level", "event"]
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "WARNING",
        "event": "kernels_chosen",
        "pipeline": "g",
        "rank": 1,
        "backend": "cpu",
        "reason": 'a "word"\nof 100 %s',
    }


def test_a_failure_brings_its_traceback_in_the_same_line(written: io.StringIO) -> None:
    try:
        raise ZeroDivisionError("a shard is gone")
    except ZeroDivisionError as error:
        tell(log, logging.ERROR, "shard_failed", error)
    (line,) = lines(written)
    assert (line["level"], line["event"]) == ("ERROR", "shard_failed")
    assert line["traceback"].endswith("ZeroDivisionError: a shard is gone")


def test_a_full_file_of_events_is_followed_by_another(tmp_path: Path) -> None:
    made: list[str] = []

    class Counted(EventFormatter):
        def format(self, record: logging.LogRecord) -> str:
            made.append(super().format(record))
            return made[-1]

    handler = EventFile(tmp_path / "events", maxBytes=200, backupCount=1)
    handler.setFormatter(Counted({}))
    for number in range(5):
        handler.handle(logging.LogRecord("workers", logging.INFO, "", 0, f"event {number}", (), None))
    handler.close()
    full, current = ((tmp_path / name).read_text().splitlines() for name in ("events.1", "events"))
    assert (len(full), len(current)) == (3, 2)
    assert [*full, *current] == made  # and no line was made twice


def test_what_is_below_the_level_is_not_written_and_what_is_no_event_is(written: io.StringIO) -> None:
    tell(log, logging.DEBUG, "detail")
    logging.getLogger("cluster.other").info("%d words", 2)
    assert [line["event"] for line in lines(written)] == ["2 words"]


def test_an_application_gets_events_as_records_of_its_own_logging(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    tell(log, logging.INFO, "kernels_chosen", backend="cpu", threads=2)
    (record,) = caplog.records
    assert record.getMessage() == "kernels_chosen backend='cpu' threads=2"
    assert (record.name, record.funcName) == (
        log.name,
        "test_an_application_gets_events_as_records_of_its_own_logging",
    )


def test_the_tail_shows_whole_lines_of_a_level_once(tmp_path: Path) -> None:
    shown: list[str] = []
    tail = EventTail(logging.WARNING, shown.append)
    file = tmp_path / f"replica_a{SUFFIX}"

    def say(level: int, event: str) -> str:
        record = logging.LogRecord("workers", level, "", 0, event, (), None)
        return EventFormatter({}).format(record) + "\n"

    old, quiet, loud, late, other = (
        say(level, event)
        for level, event in (
            (logging.WARNING, "old"),
            (logging.INFO, "quiet"),
            (logging.WARNING, "loud"),
            (logging.ERROR, "late"),
            (logging.ERROR, "other"),
        )
    )
    file.write_text(old)
    (tmp_path / "replica_a.log").write_text("not ours")
    tail.skip(tmp_path)
    with file.open("a") as writer:
        writer.write(quiet + loud + late[:9])
        writer.flush()
        tail.read(tmp_path)
        assert shown == [loud.rstrip()]
        writer.write(late[9:])
    file.rename(tmp_path / f"{file.name}.1")  # full, as RotatingFileHandler has it
    file.write_text(other)
    for _ in range(3):
        tail.read(tmp_path)
    assert shown == [line.rstrip() for line in (loud, late, other)]
    tail.close()
