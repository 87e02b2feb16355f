"""`supervise timeline`, in process: chart, table, SVG and JSON, and which job is meant."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve
from rich.console import Console

from supervise import IndexSettings, Settings, WorkerSettings
from supervise.cli import streams
from supervise.cli import timeline as command
from supervise.codec import to_line
from supervise.dispatch.submit import job_id_of
from supervise.errors import SettingsError, SuperviseError
from supervise.job.directory import occupy
from supervise.observe.timeline import timeline_of
from tests.unit.test_timeline import BEGAN, HOSTILE, JOB, event, rfc3339


class Desk:
    """A state directory, and what the command puts on standard output and says to people."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tmp = tmp_path
        self.settings = Settings(state_dir=tmp_path / "state", index=IndexSettings(mode="none"))
        self.jobs = self.settings.state_dir / "jobs"
        self.said = ""
        self.out = b""
        monkeypatch.setattr(command, "STDOUT", os.open(tmp_path / "stdout", os.O_RDWR | os.O_CREAT | os.O_APPEND))
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        codecs.register_error(streams.SPELL, streams._spell)  # as each command does at its start

    def job(self, job_id: str, events: list[dict[str, Any]] = JOB, rest: bytes = b"") -> Path:
        directory = self.jobs / job_id
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "events.jsonl").write_bytes(b"".join(map(to_line, events)) + rest)
        return directory

    async def run(
        self, job: str, *, svg: Path | None = None, json: bool = False, settings: Settings | None = None
    ) -> int:
        told = io.StringIO()
        (self.tmp / "stdout").write_bytes(b"")
        try:
            return await command.run(settings or self.settings, job, svg, json, console=Console(file=told, width=400))
        finally:
            self.said = told.getvalue()
            self.out = (self.tmp / "stdout").read_bytes()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    desk = Desk(tmp_path, monkeypatch)
    yield desk
    os.close(command.STDOUT)


def of_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """Standard output is a file of this encoding."""
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))


async def test_the_chart_has_a_line_for_each_lane_and_a_row_for_each_span(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_encoding(monkeypatch, "utf-8")
    desk.job("j1")
    assert await desk.run("j1") == 0
    lines = desk.out.decode().splitlines()
    assert lines[0] == f"j1: cancelled after 0.951 s, began {rfc3339(BEGAN)[:-4]}Z"
    assert max(map(len, lines[: lines.index("")])) <= 100
    chart = {line.split()[0]: line for line in lines[4 : lines.index("")]}
    assert {"job", "index", "reconcile", "watch", "agent", "heartbeat", "signals", "cancel"} <= set(chart)
    assert " running " in chart["job"]
    assert "SIGTERM → agent ×3" in chart["signals"]
    rows = [line.split() for line in lines[lines.index("") + 2 :]]
    assert ["agent", "SIGTERM", "0.500", "s", "0.800", "s", "0.300", "s", "prog", "(pid", "7)"] in rows
    assert ["cancel", "cancel", "0.700", "s", "enough"] in rows
    assert "\x1b" not in desk.out.decode()
    assert desk.said == ""


async def test_where_the_encoding_has_no_blocks_the_bars_are_ascii(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    of_encoding(monkeypatch, "ascii")
    desk.job("j1")
    assert await desk.run("j1") == 0
    assert desk.out.isascii()
    assert b"SIGTERM -> agent x3" in desk.out
    assert b"####" in desk.out


@pytest.mark.parametrize("columns", [20, 40, 72, 200])
async def test_on_a_terminal_no_line_is_wider_than_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    desk.job("20261121T150304Z-269ae84a")
    assert await desk.run("20261121T150304Z-269ae84a") == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", desk.out.decode()).splitlines()
    assert max(map(len, lines)) <= columns
    assert any(line.startswith("job") for line in lines)


async def test_what_is_open_is_told_so_and_why(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    of_encoding(monkeypatch, "utf-8")
    desk.job("j1", JOB[:14], b'{"type":"heartb')
    assert await desk.run("j1") == 0
    text = desk.out.decode()
    assert "j1: no end in its log, so far 0.600 s" in text
    assert "▶" in text
    assert " open " in text
    assert "the job has not ended: its supervisor was killed; its last sign of life was" in desk.said


async def test_a_job_that_lives_is_drawn_up_to_now(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    of_encoding(monkeypatch, "utf-8")
    directory = desk.job("j1", [])
    holder = occupy(directory)
    try:
        began = event("job_started", workspace="/w", agent="a", index="none", containment="c")
        desk.job("j1", [{**began, "time": rfc3339(time.time() - 40)}])
        assert await desk.run("j1") == 0
    finally:
        holder.release()
    assert "the job has not ended: it runs" in desk.said
    assert re.search(r"so far 4\d\.\d{3} s", desk.out.decode())


async def test_a_log_that_ends_before_its_job_is_told_so(desk: Desk) -> None:
    directory = desk.job("j1", JOB[:14])
    (directory / "result.json").write_text('{"outcome": "completed"}')
    assert await desk.run("j1") == 0
    assert "the job has ended (completed), but its event log ends before" in desk.said


@pytest.mark.parametrize("content", [b"[" * 200_000, b"", b"{}", b"[]", b'{"outcome": "x"', b"\xff"])
async def test_a_result_that_cannot_be_read_is_told(desk: Desk, content: bytes) -> None:
    directory = desk.job("j1", JOB[:14])
    (directory / "result.json").write_bytes(content)
    assert await desk.run("j1") == 0
    assert f"cannot be read: {directory / 'result.json'}" in desk.said


async def test_of_a_result_only_so_much_is_read(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "LONGEST_RESULT", 100)
    directory = desk.job("j1", JOB[:14])
    (directory / "result.json").write_text(" " * 100 + '{"outcome": "completed"}')
    assert await desk.run("j1") == 0
    assert "cannot be read" in desk.said


@pytest.mark.parametrize("name", ["events.jsonl", "result.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a link", "a directory"])
async def test_what_is_no_file_of_a_job_is_neither_waited_for_nor_followed(
    desk: Desk, tmp_path: Path, name: str, kind: str
) -> None:
    directory = desk.job("j1", JOB[:14])
    path = directory / name
    if path.exists():
        path.rename(tmp_path / "real")
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link":
        (tmp_path / "real").touch()
        path.symlink_to(tmp_path / "real")
    else:
        path.mkdir()
    os.mkfifo(directory / "heartbeat.json")
    with trio.fail_after(10):
        if name == "events.jsonl":
            with pytest.raises(SuperviseError, match=rf"cannot be read: {path}: it is"):
                await desk.run("j1")
        else:
            assert await desk.run("j1") == 0
            assert f"cannot be read: {path}" in desk.said


async def test_cancelling_waits_for_no_log_that_is_long(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, go_on = threading.Event(), threading.Event()

    def slow(_: Path) -> Any:
        reads.set()
        assert go_on.wait(20)
        return iter(())

    monkeypatch.setattr(command, "_events", slow)
    desk.job("j1")
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(desk.run, "j1")
            await trio.to_thread.run_sync(reads.wait)
            nursery.cancel_scope.cancel()
    assert not go_on.is_set()
    go_on.set()


async def test_what_looks_like_markup_is_no_markup(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    of_encoding(monkeypatch, "utf-8")
    roles = ("[/x]", "[link=file:///etc/passwd]agent[/link]", "[red]")
    desk.job("j1", [event("process_started", 0, role=role, pid=1) for role in roles])
    assert await desk.run("j1") == 0
    text = desk.out.decode()
    assert all(role in text for role in roles)


async def test_the_picture_is_written_whole_and_where_is_said(desk: Desk, tmp_path: Path) -> None:
    desk.job("j1")
    path = tmp_path / "life.svg"
    path.write_text("old")
    assert await desk.run("j1", svg=path) == 0
    assert desk.out == b""
    assert desk.said == f"supervise: the picture is in {path}\n"
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert [each.name for each in tmp_path.iterdir() if "life" in each.name] == ["life.svg"]


async def test_a_link_stays_a_link_to_the_picture(desk: Desk, tmp_path: Path) -> None:
    desk.job("j1")
    (tmp_path / "link.svg").symlink_to(tmp_path / "real.svg")
    assert await desk.run("j1", svg=tmp_path / "link.svg") == 0
    assert (tmp_path / "link.svg").is_symlink()
    assert "<svg" in (tmp_path / "real.svg").read_text()


async def test_a_dash_is_standard_output(desk: Desk) -> None:
    desk.job("j1")
    assert await desk.run("j1", svg=Path("-")) == 0
    assert ElementTree.fromstring(desk.out).tag.endswith("svg")


async def test_as_json_it_is_one_object(desk: Desk, tmp_path: Path) -> None:
    desk.job("j1")
    assert await desk.run("j1", svg=tmp_path / "life.svg", json=True) == 0
    assert desk.out.count(b"\n") == 1
    assert json.loads(desk.out)["lanes"][0]["name"] == "job"
    assert (tmp_path / "life.svg").exists()


@pytest.mark.parametrize("place", ["a directory", "a pipe", "a place that is not there"])
async def test_where_no_picture_can_be_it_is_refused(desk: Desk, tmp_path: Path, place: str) -> None:
    desk.job("j1")
    path = tmp_path / "place"
    if place == "a directory":
        path.mkdir()
    elif place == "a pipe":
        os.mkfifo(path)
    else:
        path = path / "life.svg"
    with pytest.raises(SuperviseError, match="the picture cannot be written to"):
        await desk.run("j1", svg=path)
    assert path.is_dir() or path.is_fifo() or not path.exists()


async def test_json_and_picture_cannot_both_be_standard_output(desk: Desk) -> None:
    with pytest.raises(SettingsError, match="both want standard output"):
        await desk.run("j1", svg=Path("-"), json=True)


async def test_an_unknown_job_is_told_with_the_nearest_ids(desk: Desk) -> None:
    for name in ("20261121T150304Z-269ae84a", "20261121T150304Z-11111111", "other"):
        desk.job(name)
    for given, near in (("20261121T150304Z-269ae84b", "269ae84a"), ("269ae", "269ae84a"), ("../../etc", "latest one")):
        with pytest.raises(SuperviseError) as refused:
            await desk.run(given)
        assert str(desk.jobs) in str(refused.value)
        assert near in str(refused.value)


async def test_where_there_is_no_job_at_all_it_says_so(desk: Desk) -> None:
    with pytest.raises(SuperviseError, match="there is no job at all; set state_dir"):
        await desk.run("j1")


async def test_a_job_without_an_event_log_is_told(desk: Desk) -> None:
    (desk.jobs / "j1").mkdir(parents=True)
    with pytest.raises(SuperviseError, match="job j1 has no event log"):
        await desk.run("j1")


async def test_a_log_without_an_event_is_told(desk: Desk) -> None:
    desk.job("j1", [], b"torn")
    with pytest.raises(SuperviseError, match="holds no event yet"):
        await desk.run("j1")


async def test_a_task_means_its_latest_attempt(desk: Desk, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for kind in ("tasks", "running", "results", "dlq", "triggers"):
        (root / kind / "w1").mkdir(parents=True)
    (root / "results" / "w1" / "t1.json").write_text("{}")
    settings = evolve(desk.settings, worker=WorkerSettings(root=root))
    with pytest.raises(SuperviseError, match="task t1 of worker w1 has no job under"):
        await desk.run("t1", settings=settings)
    for attempt in (2, 10):
        directory = desk.job(job_id_of("w1", "t1", attempt, root))
        os.utime(directory, (BEGAN + attempt, BEGAN + attempt))
    assert await desk.run("t1", settings=settings, json=True) == 0
    assert job_id_of("w1", "t1", 10, root) in desk.said
    with pytest.raises(SuperviseError, match="and no task under"):
        await desk.run("t2", settings=settings)


async def test_lines_of_any_kind_are_read(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    of_encoding(monkeypatch, "utf-8")
    too_long = b"x" * command.LINE + to_line(event("state", 0.7, state="stopping"))
    strange = b"\n[]\n\xff\xfe\n" + b"[" * 100_000 + b"\n" + too_long + b"{}\n"
    events = [event("cancel", 0, reason=HOSTILE, step=1), event("process_started", 0.5, role=HOSTILE, pid=1)]
    desk.job("j1", events, strange + to_line(event("state", 1, state="running")))
    assert await desk.run("j1") == 0
    text = desk.out.decode()
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "running" in text
    assert "stopping" not in text
    read = timeline_of(command._events(desk.jobs / "j1" / "events.jsonl"))
    assert read.lanes[0].name == "job"


async def test_a_table_has_an_end(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    of_encoding(monkeypatch, "utf-8")
    desk.job("j1", [event("signal_sent", number, role="agent", signal="SIGTERM", count=1) for number in range(500)])
    assert await desk.run("j1") == 0
    assert b"and 300 more; --json tells of all" in desk.out
