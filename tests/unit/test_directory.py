"""The directory as a source of tasks, driven step by step: what hints and looks make of files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from supervise.dispatch import directory, records
from supervise.dispatch.backlog import Offer
from supervise.dispatch.directory import DirectorySource
from supervise.dispatch.source import Arrived, Completed, News, SourceTrouble, Vanished
from supervise.dispatch.spool import Spool
from supervise.dispatch.task import Attempt
from supervise.events import Event, TaskBuried

Make = Callable[..., DirectorySource]


class Clock:
    """On the wall."""

    def __init__(self) -> None:
        self.time = 1_000_000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "root", "w")
    spool.create()
    return spool


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def make(spool: Spool, events: list[Event]) -> Make:
    def made(**changes: Any) -> DirectorySource:
        bounds: dict[str, Any] = {"sweep_interval": 60.0, "poll_interval": 0.05, "parse_grace": 0.05}
        return DirectorySource(spool, **{**bounds, **changes}, emit=events.append)

    return made


def put(spool: Spool, name: str, task_id: str, **fields: Any) -> Path:
    hidden = spool.tasks.parent / name
    hidden.write_text(json.dumps({"task_id": task_id, "description": "d", **fields}))
    path = spool.tasks / name
    hidden.rename(path)
    return path


class Ear:
    """Hears what the source tells, and waits for it."""

    def __init__(self, source: DirectorySource) -> None:
        self.source = source
        self.heard: list[News] = []
        self._woken = trio.Event()
        source.listen(lambda: self._woken.set())

    async def until(self, test: Callable[[News], bool]) -> News:
        with trio.fail_after(10):
            while True:
                self.heard += self.source.news()
                for each in self.heard:
                    if test(each):
                        self.heard.remove(each)
                        return each
                self._woken = trio.Event()
                await self._woken.wait()

    async def arrival(self, task_id: str) -> Offer:
        news = await self.until(lambda each: isinstance(each, Arrived) and each.offer.task_id == task_id)
        assert isinstance(news, Arrived)
        return news.offer


@asynccontextmanager
async def running(source: DirectorySource) -> AsyncIterator[Ear]:
    async with trio.open_nursery() as nursery:
        ear = Ear(source)
        await nursery.start(source.run)
        yield ear
        nursery.cancel_scope.cancel()


async def eventually(test: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not test():
            await trio.sleep(0.01)  # files and attributes tell nobody


async def test_a_task_that_gets_another_name_waits_on(spool: Spool, make: Make, events: list[Event]) -> None:
    async with running(make()) as ear:
        path = put(spool, "a.json", "x")
        assert (await ear.arrival("x")).key == "a.json"
        path.rename(spool.tasks / "b.json")
        assert (await ear.arrival("x")).key == "b.json"
        await ear.until(lambda each: each == Vanished("a.json"))
    assert not [event for event in events if isinstance(event, TaskBuried)]


async def test_a_second_task_of_an_id_is_set_aside(spool: Spool, make: Make) -> None:
    async with running(make()) as ear:
        put(spool, "a.json", "x")
        await ear.arrival("x")
        put(spool, "b.json", "x")
        await eventually(lambda: (spool.dlq / "x.raw").exists())
        assert (spool.tasks / "a.json").exists()


async def test_a_good_file_that_takes_the_place_of_a_half_one_is_not_set_aside(
    spool: Spool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes between the look and the quarantine."""
    real = spool.quarantine

    def late(*args: Any) -> bool:
        put(spool, "a.json", "x")
        return real(*args)

    monkeypatch.setattr(spool, "quarantine", late)
    async with running(make()) as ear:
        (spool.tasks / "a.json").write_text("{")
        assert (await ear.arrival("x")).key == "a.json"
    assert os.listdir(spool.dlq) == []


async def test_what_cannot_be_set_aside_is_tried_again_after_a_pause(
    spool: Spool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def full(path: Path, record: Any) -> None:
        tries.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(spool, "_publish", full)
    source = make(poll_interval=0.2)
    async with running(source):
        (spool.tasks / "a.json").write_text("[]")
        await eventually(lambda: len(tries) >= 3)
        assert "No space left" in source.troubles["directory"]
        seen = len(tries)
        await trio.sleep(0.5)  # a length on purpose: how often it is tried in it is what is measured
        assert len(tries) - seen <= 4
        assert (spool.tasks / "a.json").exists()
        assert os.listdir(spool.dlq) == []
        monkeypatch.undo()
        await eventually(lambda: (spool.dlq / "a.raw").exists())
        await eventually(lambda: not source.troubles)


async def test_a_claim_that_was_refused_goes_on_where_it_was_broken_off(
    spool: Spool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(make()) as ear:
        put(spool, "a.json", "x")
        offer = await ear.arrival("x")

        def refuse(path: Path) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with monkeypatch.context() as patch:
            patch.setattr("supervise.durable.sync_directory", refuse)
            with pytest.raises(SourceTrouble, match="ulimit"):
                await ear.source.claim(offer)
        assert os.listdir(spool.running) == ["x.json"]
        claim = await ear.source.claim(offer)
        assert claim is not None
        await claim.finish({"task_id": "x"})
        assert os.listdir(spool.running) == []


async def test_a_claim_that_nobody_asks_for_again_is_put_back(
    spool: Spool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(make()) as ear:
        put(spool, "a.json", "x")
        offer = await ear.arrival("x")

        def refuse(path: Path) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with monkeypatch.context() as patch:
            patch.setattr("supervise.durable.sync_directory", refuse)
            with pytest.raises(SourceTrouble, match="ulimit"):
                await ear.source.claim(offer)
        spool.give_up_begun()
    assert (os.listdir(spool.running), os.listdir(spool.tasks)) == ([], ["a.json"])


async def test_a_file_of_the_same_name_is_news_while_the_first_is_claimed(
    spool: Spool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = spool.claim

    def slow(*args: Any) -> Any:
        held = real(*args)
        put(spool, "a.json", "y")
        return held

    monkeypatch.setattr(spool, "claim", slow)
    async with running(make()) as ear:
        put(spool, "a.json", "x")
        claim = await ear.source.claim(await ear.arrival("x"))
        assert claim is not None
        assert (await ear.arrival("y")).key == "a.json"
        await ear.source._look_through()
        assert not ear.source.news(), "it is told once"


async def test_a_clock_that_is_set_back_does_not_prolong_a_pause(spool: Spool, make: Make) -> None:
    clock = Clock()
    source = make(now=clock)
    async with running(source) as ear:
        put(spool, "a.json", "x")
        claim = await source.claim(await ear.arrival("x"))
        assert claim is not None
        await claim.retry((Attempt(attempt=1),), clock() + 5)
        assert (await ear.arrival("x")).not_before == clock() + 5
        clock.time -= 86_400
        await source._look_through()
        assert (await ear.arrival("x")).not_before == clock() + 5
    later = make(now=clock)  # nor does it after a restart
    async with running(later) as ear:
        assert (await ear.arrival("x")).not_before == clock() + 5


async def test_a_time_that_the_task_names_is_not_shortened(spool: Spool, make: Make) -> None:
    clock = Clock()
    async with running(make(now=clock)) as ear:
        put(spool, "a.json", "x", not_before=clock() + 1000)
        claim = await ear.source.claim(await ear.arrival("x"))
        assert claim is not None
        await claim.retry((Attempt(attempt=1),), clock() + 5)
        assert (await ear.arrival("x")).not_before == clock() + 1000


async def test_one_result_that_cannot_be_read_hides_no_other(
    spool: Spool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for worker, status in (("evil", "completed"), ("good", "completed")):
        (spool.results.parent / worker).mkdir()
        (spool.results.parent / worker / "dep.json").write_text(json.dumps({"status": status}))
    real = os.open

    def refuse(path: Any, *args: Any, **more: Any) -> int:
        if "evil" in os.fspath(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    source = make()
    async with running(source):
        assert await source.completed(["dep"]) == {"dep"}
        assert set(source.troubles) <= {"results"}


async def test_a_result_that_is_nested_too_deep_completes_nothing(spool: Spool, make: Make) -> None:
    (spool.results / "dep.json").write_text("[" * 200_000)
    async with running(make()) as ear:
        assert await ear.source.completed(["dep"]) == set()


async def test_a_result_of_somebody_else_is_told_when_it_comes(spool: Spool, make: Make) -> None:
    async with running(make()) as ear:
        put(spool, "a.json", "x", dependencies=["dep"])
        await ear.arrival("x")
        assert await ear.source.completed(["dep"]) == set()
        other = Spool(spool.root, "other")
        other.create()
        held = None
        put(other, "dep.json", "dep")
        held = other.claim("dep.json", "dep")
        assert held is not None
        other.finish(held, {"task_id": "dep", "status": "completed"})
        await ear.until(lambda each: each == Completed("dep"))


async def test_a_trigger_that_could_not_be_written_is_written_later(
    spool: Spool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refusals = spool.trigger, [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")]

    def once(*args: Any) -> None:
        if refusals:
            raise refusals.pop()
        real(*args)

    monkeypatch.setattr(spool, "trigger", once)
    async with running(make()):
        for number in range(5):
            put(spool, f"{number}.json", f"t{number}")
        await eventually(lambda: len(os.listdir(spool.triggers)) == 5)


async def test_a_queue_past_the_limit_is_told_and_waits(
    spool: Spool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "MOST_KNOWN", 3)
    monkeypatch.setattr(directory, "BATCH", 1)
    source = make()
    for number in range(3):
        put(spool, f"{number}.json", f"t{number}")
    async with running(source) as ear:
        first = await ear.arrival("t0")
        for number in range(3, 6):
            put(spool, f"{number}.json", f"t{number}")
        await eventually(lambda: source._more)
        assert len(source._offers) == 3
        await source._look_through()
        assert "longer than" in source.troubles["queue"]
        for offer in (first, await ear.arrival("t1"), await ear.arrival("t2")):
            claim = await source.claim(offer)
            assert claim is not None
            await claim.finish({"task_id": offer.task_id})
        await source._look_through()
        for number in range(3, 6):
            await ear.arrival(f"t{number}")


async def test_a_file_that_is_no_task_is_told_with_its_name(spool: Spool, make: Make, events: list[Event]) -> None:
    async with running(make()):
        (spool.tasks / "odd name.json").write_text("[]")
        await eventually(lambda: (spool.dlq / "odd name.json").exists() or (spool.dlq / "odd_name.json").exists())
    (buried,) = [event for event in events if isinstance(event, TaskBuried)]
    assert buried.task_id == "odd name.json"
    record = records.no_task("odd name.json", None, "w", buried.detail, 0.0)
    assert record["name"] == "odd name.json"
