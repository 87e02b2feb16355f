"""Logs, tails and lines: bounded, and never an exception for a disk."""

from __future__ import annotations

import io
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from supervise.processes.output import BoundedLog, Lines, Logs, Output, Tail
from supervise.secrets import Masker


def log_of(path: Path, limit: int, *chunks: bytes) -> tuple[bytes, list[str]]:
    """What the file holds in the end, and the troubles told."""
    told: list[str] = []
    log = BoundedLog(path, limit, told.append)
    for chunk in chunks:
        log.write(chunk)
    log.close()
    return path.read_bytes(), told


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


# --- BoundedLog --------------------------------------------------------------------------------------------


def test_a_short_log_is_whole(tmp_path: Path) -> None:
    assert log_of(tmp_path / "log", 100, b"one", b"", b"two\n") == (b"onetwo\n", [])


def test_a_log_of_just_the_limit_is_whole(tmp_path: Path) -> None:
    data = bytes(range(100))
    assert log_of(tmp_path / "log", 100, data) == (data, [])
    assert names(tmp_path) == ["log"]


def test_past_the_limit_head_and_tail_are_kept(tmp_path: Path) -> None:
    kept, told = log_of(tmp_path / "log", 20, b"0123456789", b"abcdefghijklmnopqrst", b"UVW")
    assert kept == b"0123456789\n[\xe2\x80\xa6 15 bytes left out \xe2\x80\xa6]\n" + b"pqrstUVW"
    assert told == ["the log is full: head and tail are kept"]
    assert names(tmp_path) == ["log"]


def test_an_old_log_is_replaced_and_ours_is_private(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("old")
    assert log_of(tmp_path / "log", 20, b"new") == (b"new", [])
    log_of(tmp_path / "another", 20, b"new")
    assert stat.S_IMODE((tmp_path / "another").stat().st_mode) == 0o600


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "log").symlink_to(tmp_path / "precious")
    kept, told = log_of(tmp_path / "log", 20, b"x")
    assert kept == b"precious"
    assert len(told) == 1


def test_a_log_that_cannot_be_opened_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    log = BoundedLog(tmp_path / "missing" / "log", 20, told.append)
    for _ in range(3):
        log.write(b"x" * 50)
    log.close()
    assert len(told) == 1
    assert "missing/log" in told[0]
    assert "No such file" in told[0]


def test_a_full_disk_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedLog, "_open", lambda self, path: io.FileIO("/dev/full", "w"))
    told: list[str] = []
    log = BoundedLog(tmp_path / "log", 1000, told.append)
    for _ in range(3):
        log.write(b"x")
    log.close()
    assert told == [f"writing the log {tmp_path}/log failed: No space left on device"]


@pytest.mark.parametrize("reader", [False, True], ids=["nobody reads it", "somebody reads it"])
@pytest.mark.parametrize("name", ["log", "log.tail0", "log.tail1"])
def test_a_planted_fifo_is_not_waited_for(tmp_path: Path, name: str, reader: bool) -> None:
    os.mkfifo(tmp_path / name)
    descriptor = os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK) if reader else None
    told: list[str] = []
    try:
        log = BoundedLog(tmp_path / "log", 20, told.append)
        log.write(b"x" * 100)
        log.close()
    finally:
        if descriptor is not None:
            os.close(descriptor)
    assert len(told) == 1
    assert f"writing the log {tmp_path}/log failed" in told[0]


@pytest.mark.parametrize("name", ["log", "log.tail0"])
def test_a_fifo_planted_later_is_not_waited_for(tmp_path: Path, name: str) -> None:
    told: list[str] = []
    log = BoundedLog(tmp_path / "log", 20, told.append)
    log.write(b"x" * 15)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    log.close()
    assert len(told) == 1


def test_a_device_is_no_log() -> None:
    told: list[str] = []
    log = BoundedLog(Path("/dev/null"), 20, told.append)
    log.write(b"x")
    log.close()
    assert told == ["writing the log /dev/null failed: it is no regular file"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_disk_that_takes_a_part_only_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    log = BoundedLog(tmp_path / "log", 1000, told.append)
    with files_of_at_most(60):
        log.write(b"a" * 50)
        log.write(b"b" * 50)  # the first ten of these bytes are taken, without an error
    log.write(b"c")
    log.close()
    assert (tmp_path / "log").read_bytes() == b"a" * 50 + b"b" * 10
    assert len(told) == 1


def test_what_the_disk_took_is_put_together(tmp_path: Path) -> None:
    told: list[str] = []
    log = BoundedLog(tmp_path / "log", 80, told.append)
    log.write(b"h" * 40 + b"t" * 20)
    with files_of_at_most(5):
        log.write(b"u" * 20)
    log.close()
    assert (tmp_path / "log").read_bytes() == b"h" * 40 + b"t" * 20 + b"u" * 5
    assert names(tmp_path) == ["log"]
    assert len(told) == 1


def test_a_directory_that_goes_away_is_no_error(tmp_path: Path) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    told: list[str] = []
    log = BoundedLog(directory / "log", 20, told.append)
    log.write(b"x" * 10)
    os.unlink(directory / "log")
    directory.rmdir()
    log.write(b"y" * 10)
    log.close()
    assert len(told) == 1


# --- Tail --------------------------------------------------------------------------------------------------


def test_a_tail_of_nothing_is_empty() -> None:
    tail = Tail(0)
    tail.add(b"abc")
    assert tail.text() == ""


def test_a_tail_of_many_small_chunks() -> None:
    tail = Tail(3000)
    for number in range(5000):
        tail.add(b"%d" % (number % 10))
    assert tail.text() == "0123456789" * 300


def test_a_tail_cut_within_a_character_is_text() -> None:
    tail = Tail(3)
    tail.add("a€".encode())
    assert tail.text() == "€"
    tail.add(b"bc")
    assert tail.text() == "\ufffdbc"


# --- Lines -------------------------------------------------------------------------------------------------


def lines_of(*chunks: bytes, limit: int = 64 * 1024) -> list[str]:
    out: list[str] = []
    lines = Lines(out.append, limit)
    for chunk in chunks:
        lines.feed(chunk)
    lines.close()
    return out


def test_lines() -> None:
    assert lines_of(b"one\ntw", b"o\r\n\nthr", b"ee") == ["one", "two", "", "three"]


def test_no_output_is_no_line() -> None:
    assert lines_of(b"", b"") == []


def test_the_rest_of_a_long_line_is_dropped() -> None:
    assert lines_of(b"abc", b"def", b"ghi\njkl\n", limit=4) == ["abcd", "jkl"]


def test_an_endless_line_holds_no_memory() -> None:
    lines = Lines(lambda line: None, 100)
    for _ in range(1000):
        lines.feed(b"x" * 1000)
    assert len(lines._begun) == 100


# --- Output ------------------------------------------------------------------------------------------------


def test_all_that_is_kept_of_an_output_is_masked(tmp_path: Path) -> None:
    got: list[bytes] = []
    log = BoundedLog(tmp_path / "log", 1000, lambda reason: None)
    output = Output(mask=Masker(["secret"]).stream(), tail_bytes=100, log=log, sink=got.append)
    for chunk in (b"a sec", b"ret and sec"):
        output.feed(chunk)
    assert b"".join(got) == b"a *** and "  # the rest may be the beginning of a secret
    output.close()
    log.close()
    assert b"".join(got) == b"a *** and sec"
    assert output.tail() == "a *** and sec"
    assert (tmp_path / "log").read_bytes() == b"a *** and sec"
    assert output.size == 16


def test_trees_of_one_role_share_a_log(tmp_path: Path) -> None:
    logs = Logs(tmp_path, 1000)
    logs.of("watch", "stdout", lambda reason: None).write(b"first\n")
    logs.of("watch", "stdout", lambda reason: None).write(b"again after a crash\n")
    logs.of("agent", "stdout", lambda reason: None).write(b"hello\n")
    logs.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent.stdout.log", "watch.stdout.log"]
    assert (tmp_path / "watch.stdout.log").read_text() == "first\nagain after a crash\n"
