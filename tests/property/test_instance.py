"""The lock of a single instance: who may take it over; many lockers that are stopped and killed between any calls."""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

from supervise.dispatch import instance
from supervise.dispatch.instance import Found, Holder, InstanceLock, may_take, parse, render, take
from supervise.errors import AlreadyRunning
from supervise.processes import identity
from supervise.processes.identity import Process

QUICK = settings(max_examples=100, deadline=None)

pids = st.integers(1, (1 << 31) - 1)
texts = st.text(max_size=40)
holders = st.builds(Holder, pids) | st.builds(Holder, pids, st.integers(0, 1 << 60), texts, st.none() | texts)


# --- contents ----------------------------------------------------------------------------------------------


@given(holders)
@QUICK
def test_what_is_written_is_read_again(holder: Holder) -> None:
    assert parse(render(holder)) == holder


@given(holders, st.data())
@QUICK
def test_a_file_that_breaks_off_after_the_pid_still_names_it(holder: Holder, data: st.DataObject) -> None:
    whole = render(holder)
    end = data.draw(st.integers(len(str(holder.pid)), len(whole)))
    assert parse(whole[:end]) in (holder, Holder(holder.pid))


crumbs = st.sampled_from(
    [
        b"12",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b"-",
        b"{",
        b"}",
        b"[" * 2000,
        b'"start":',
        b'"boot":',
        b"1e999",
        b"null",
        b"NaN",
    ]
)


@given(st.binary(max_size=200) | st.lists(crumbs | st.binary(max_size=5), max_size=12).map(b"".join))
@QUICK
def test_parse_never_raises_and_names_processes_only(data: bytes) -> None:
    holder = parse(data)
    event(f"names somebody: {holder is not None}")
    if holder is not None:
        assert 0 < holder.pid < 1 << 31
        assert data.lstrip().startswith(str(holder.pid).encode()) or data.lstrip().startswith(b"0")
        assert (holder.start is None) == (holder.boot is None)
        assert parse(render(holder)) == holder


# --- the rule ----------------------------------------------------------------------------------------------

moments = st.floats(0, 1e7)
steps = st.just(0.0) | st.floats(-200, 200) | st.floats(-1e9, 1e9)


@attrs.frozen
class World:
    """A machine whose clock was set once, at a moment of its life; `offset_at` of that clock to the time since boot."""

    mounted_at: float
    set_at: float
    step: float

    def offset_at(self, moment: float) -> float:
        return 1.8e9 + (self.step if moment >= self.set_at else 0.0)

    def found(self, *, now: float, written_at: float, start: float, **changes: Any) -> Found:
        """What is found now of a file written then and a process started then, all in seconds since boot."""
        booted_at = self.offset_at(now)
        proc = self.mounted_at + self.offset_at(self.mounted_at)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(instance, "os", SimpleNamespace(stat=lambda path: SimpleNamespace(st_mtime=proc)))
            patch.setattr(instance, "identity", SimpleNamespace(read=lambda pid: stat_of(pid, 0), ticks=identity.ticks))
            steady = instance._clock_is_steady(booted_at)
        event(f"steady: {steady}, set: {abs(self.step) > 60}")
        known: dict[str, Any] = {
            "own_pid": 1000,
            "boot": "this",
            "namespace": "here",
            "booted_at": booted_at,
            "written_at": written_at + self.offset_at(written_at),
            "clock_is_steady": steady,
            "alive": True,
            "start": int(start * identity.ticks()),
        }
        return Found(**{**known, **changes})


worlds = st.builds(World, st.floats(0, instance.MOUNTED_WITHIN - 1), moments | st.floats(0, 100), steps)


def stat_of(pid: int, start: int) -> Process:
    return Process(pid, parent=1, group=pid, session=pid, state="S", start=start)


@given(worlds, st.lists(moments, min_size=3, max_size=3).map(sorted), st.booleans(), st.booleans())
@QUICK
def test_a_living_writer_keeps_it_however_the_clock_was_set(
    world: World, order: list[float], plain: bool, hidden: bool
) -> None:
    start, written_at, now = (world.mounted_at + moment for moment in order)  # nothing runs before /proc is there
    found = world.found(now=now, written_at=written_at, start=start)
    holder = Holder(7) if plain else Holder(7, found.start, "this", "here")
    assert not may_take(holder, attrs.evolve(found, start=None) if hidden else found)


@given(worlds, st.lists(moments, min_size=3, max_size=3).map(sorted))
@QUICK
def test_a_process_that_could_have_written_a_plain_file_keeps_it(world: World, order: list[float]) -> None:
    """With the least time between: it wrote at once, and we look at once."""
    start, written_at, now = (world.mounted_at + moment for moment in order)
    for first, second, third in ((start, start, now), (start, written_at, written_at), (start, start, start)):
        assert not may_take(Holder(7), world.found(now=third, written_at=second, start=first))


@given(holders, worlds, st.lists(moments, min_size=3, max_size=3), st.data())
@QUICK
def test_every_proof_of_death_is_enough(holder: Holder, world: World, order: list[float], data: st.DataObject) -> None:
    written_at, start, now = order
    found = world.found(
        now=now,
        written_at=written_at,
        start=start,
        boot=holder.boot or "this",
        namespace=holder.namespace or "here",
    )
    proofs: list[Found] = [
        attrs.evolve(found, alive=False),
        attrs.evolve(found, alive=False, start=None),
        attrs.evolve(found, own_pid=holder.pid),
    ]
    if holder.start is not None:
        proofs.append(attrs.evolve(found, boot=f"not {holder.boot}"))
        proofs.append(attrs.evolve(found, start=holder.start + 1))
    if holder.namespace is not None:
        proofs.append(attrs.evolve(found, namespace=f"not {holder.namespace}"))
    assert may_take(holder, data.draw(st.sampled_from(proofs)))


@given(st.floats(0, instance.MOUNTED_WITHIN - 1), moments, st.floats(instance.SLACK + 1, 1e7), st.booleans())
@QUICK
def test_a_plain_file_older_than_process_or_boot_is_enough_on_a_steady_clock(
    mounted_at: float, moment: float, before: float, older_than_boot: bool
) -> None:
    start = 0.0 if older_than_boot else moment + before
    written_at = -before if older_than_boot else moment
    found = World(mounted_at, 0.0, 0.0).found(now=start + 1, written_at=written_at, start=start)
    assert may_take(Holder(7), found)


# --- many lockers ------------------------------------------------------------------------------------------

LIMIT = 10.0  # seconds for a step of a locker


class Killed(BaseException):
    """A killed process goes no further: not even its `finally` has an effect."""


class Locker:
    """A process that takes and releases again and again: a thread that stops before each call to the kernel."""

    def __init__(self, scene: Scene, pid: int, start: int, *, plain: bool) -> None:
        self.scene, self.pid, self.start, self.plain = scene, pid, start, plain
        self.descriptors: set[int] = set()
        self.lock: InstanceLock | None = None
        self.alive = True
        self.broken: BaseException | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        assert self._stopped.acquire(timeout=LIMIT)

    def step(self) -> None:
        self._go.release()
        assert self._stopped.acquire(timeout=LIMIT)
        if self.broken is not None:
            raise self.broken

    def kill(self) -> None:
        """The kernel closes what it had open; nothing else is done any more."""
        self.alive, self.lock = False, None
        for descriptor in self.descriptors:
            os.close(descriptor)
        self._go.release()
        self.thread.join(LIMIT)
        assert not self.thread.is_alive()

    def pause(self) -> None:
        """Let the others go on."""
        if self.alive:
            self._stopped.release()
            self._go.acquire()
        if not self.alive:
            raise Killed

    def _run(self) -> None:
        self.scene.threads[threading.get_ident()] = self
        try:
            while True:
                self.pause()
                try:
                    self.lock = lock = take(self.scene.path, plain=self.plain)
                except AlreadyRunning as error:
                    self.scene.told(error)
                    continue
                self.scene.taken += 1
                self.pause()
                self.lock = None
                lock.release()
        except Killed:
            return
        except BaseException as error:
            self.broken = error
        self._stopped.release()


class Scene:
    """A lock file, its lockers, and a kernel that knows them by their own pids."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.threads: dict[int, Locker] = {}
        self.lockers: list[Locker] = []
        self.started = 0
        self.taken = 0

    @property
    def me(self) -> Locker | None:
        return self.threads.get(threading.get_ident())

    def start(self, pid: int, *, plain: bool) -> Locker:
        self.started += 1
        return Locker(self, pid, 1000 + self.started, plain=plain)

    def told(self, error: AlreadyRunning) -> None:
        """Nobody is sent after the dead."""
        assert error.pid is None or self.living(error.pid) is not None, f"{error}, who is dead"

    def living(self, pid: int) -> Locker | None:
        return next((locker for locker in self.lockers if locker.alive and locker.pid == pid), None)

    def check(self) -> None:
        """At most one has it, and the file at the path is its."""
        holding = [locker for locker in self.lockers if locker.lock is not None]
        assert len(holding) <= 1, f"{len(holding)} have it"
        for locker in holding:
            assert locker.lock is not None
            named = os.lstat(self.path)
            assert os.path.samestat(named, os.fstat(locker.lock._descriptor))
            holder = parse(self.path.read_bytes())
            assert holder is not None
            assert holder.pid == locker.pid

    # what the module sees of the kernel

    def read(self, pid: int) -> Process | None:
        locker = self.living(pid)
        return None if locker is None else stat_of(pid, locker.start)

    def start_of(self, pid: int) -> int:
        process = self.read(pid)
        return -1 if process is None else process.start

    def getpid(self) -> int:
        return self.me.pid if self.me else os.getpid()

    def kill(self, pid: int, number: int) -> None:
        if self.living(pid) is None:
            raise ProcessLookupError

    def open(self, *args: Any) -> int:
        descriptor = self.stepped(os.open)(*args)
        if self.me:
            self.me.descriptors.add(descriptor)
        return int(descriptor)

    def close(self, descriptor: int) -> None:
        self.stepped(os.close)(descriptor)
        if self.me:
            self.me.descriptors.discard(descriptor)

    def stepped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any) -> Any:
            if self.me:
                self.me.pause()
            return call(*args)

        return stepped


@contextmanager
def scene_of(plain: list[bool]) -> Iterator[Scene]:
    class SteppedPath(type(Path())):  # type: ignore[misc]  # the class of paths depends on the platform
        def unlink(self, missing_ok: bool = False) -> None:
            if scene.me:
                scene.me.pause()
            super().unlink(missing_ok)

    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        scene = Scene(SteppedPath(directory, "worker.lock"))
        calls = {name: scene.stepped(getattr(os, name)) for name in ("lstat", "fstat", "pread", "pwrite", "ftruncate")}
        own = {name: getattr(scene, name) for name in ("open", "close", "getpid", "kill")}
        patch.setattr(instance, "os", SimpleNamespace(**{**vars(os), **calls, **own}))
        patch.setattr(instance, "fcntl", SimpleNamespace(**{**vars(fcntl), "flock": scene.stepped(fcntl.flock)}))
        known = {"read": scene.read, "start_of": scene.start_of}
        patch.setattr(instance, "identity", SimpleNamespace(**{**vars(identity), **known}))
        patch.setattr(instance, "_locker", lambda status: None)  # the kernel takes them all for us
        patch.setattr(instance, "_open_here", set())
        try:
            for number, is_plain in enumerate(plain):
                scene.lockers.append(scene.start(9 * 10**number, plain=is_plain))  # some are longer than others
            yield scene
        finally:
            for locker in scene.lockers:
                if locker.alive:
                    locker.kill()


#: Which one goes how many steps; none: it is killed. A whole round of take and release is some fifteen.
moves = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([1, 1, 2, 3, 4, 5, 7, 9, 12, 20, 0])), min_size=10, max_size=50
)


@given(st.lists(st.booleans(), min_size=3, max_size=3), moves)
# To make a failure shorter would take minutes: no Phase.shrink.
@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_whoever_is_stopped_or_killed_wherever_never_do_two_have_it(
    plain: list[bool], moves: list[tuple[int, int]]
) -> None:
    with scene_of(plain) as scene:
        for number, count in moves:
            locker = scene.lockers[number]
            for _ in range(count):
                locker.step()
                scene.check()
            if not count:  # its pid is given to another one
                locker.kill()
                scene.lockers[number] = scene.start(locker.pid, plain=locker.plain)
        event(f"taken: {min(scene.taken, 5)}")
        for locker in scene.lockers:
            locker.kill()
        take(scene.path).release()  # the dead keep it from nobody
        assert not scene.path.exists()


def test_lockers_one_after_another_all_get_it() -> None:
    with scene_of([False, True, False]) as scene:
        for number, locker in enumerate(scene.lockers):
            for _ in range(100):
                locker.step()
                scene.check()
                if scene.taken > number and not locker.descriptors:
                    break
            else:
                pytest.fail("it takes too many steps")
            assert scene.taken == number + 1
            assert not scene.path.exists()
