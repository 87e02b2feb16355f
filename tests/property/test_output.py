"""However a stream is cut into chunks, what is kept of it is the same, and bounded."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from supervise.processes.output import BoundedLog, Lines, Tail

MARKER = re.compile(rb"\n\[\xe2\x80\xa6 (\d+) bytes left out \xe2\x80\xa6\]\n")

chunks = st.lists(st.binary(max_size=60), max_size=20)
#: Streams that have newlines, carriage returns and characters of several bytes in them.
texts = st.lists(st.sampled_from([b"\n", b"\r", b"a", b"bc", "é".encode(), "€".encode(), b"\xff"]), max_size=60)


@settings(deadline=None)  # it writes files
@given(chunks, st.integers(4, 200))
def test_a_log_keeps_head_and_tail(data: list[bytes], limit: int) -> None:
    told: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "log")
        log = BoundedLog(path, limit, told.append)
        for chunk in data:
            log.write(chunk)
            assert sum(file.stat().st_size for file in Path(directory).iterdir()) <= limit
        log.close()
        kept = path.read_bytes()
        assert [file.name for file in Path(directory).iterdir()] == ["log"]
    whole = b"".join(data)
    if not told:
        assert kept == whole
        return
    assert len(told) == 1
    head = limit // 2
    marker = MARKER.match(kept, head)
    assert marker is not None
    assert kept[:head] == whole[:head]
    assert kept[marker.end() :] == whole[head + int(marker[1]) :]
    assert len(kept) - len(marker[0]) <= limit
    assert len(kept) - marker.end() >= limit // 4


@settings(deadline=None)  # it writes files
@given(chunks, st.integers(4, 200))
def test_nothing_is_dropped_from_a_stream_within_three_quarters(data: list[bytes], limit: int) -> None:
    told: list[str] = []
    if sum(map(len, data)) > limit // 2 + limit // 4:
        return
    with tempfile.TemporaryDirectory() as directory:
        log = BoundedLog(Path(directory, "log"), limit, told.append)
        for chunk in data:
            log.write(chunk)
        log.close()
        assert Path(directory, "log").read_bytes() == b"".join(data)
    assert told == []


@given(chunks, st.integers(0, 200))
def test_a_tail_is_the_end_of_the_stream(data: list[bytes], limit: int) -> None:
    tail = Tail(limit)
    for chunk in data:
        tail.add(chunk)
        assert sum(map(len, tail._chunks)) <= 2 * limit
    whole = b"".join(data)
    assert tail.text() == whole[max(0, len(whole) - limit) :].decode("utf-8", "replace")


@given(texts, st.integers(1, 80), st.integers(1, 30))
def test_lines_are_those_of_the_whole(data: list[bytes], step: int, limit: int) -> None:
    whole = b"".join(data)
    got: list[str] = []
    lines = Lines(got.append, limit)
    for start in range(0, len(whole), step):
        lines.feed(whole[start : start + step])
        assert len(lines._begun) <= limit
    lines.close()
    expected = whole.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert got == [line[:limit].decode("utf-8", "replace").rstrip("\r") for line in expected]
