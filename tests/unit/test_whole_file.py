"""A file is written whole or not at all."""

from pathlib import Path

import pytest

from workers.whole_file import write_whole


def test_a_file_has_what_was_written_or_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_whole(file, "one\r\ntwo\n")
    assert file.read_bytes() == b"one\r\ntwo\n"
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "three\n" * 10_000 + "\ud800")
    assert file.read_bytes() == b"one\r\ntwo\n"
