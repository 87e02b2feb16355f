"""The files of a worker: whatever it does, and wherever it dies, each task ends once.

`Disk` stands between the spool and the kernel. It counts what changes something, and can end the worker before any
such step: that one and all later ones do not happen, so that no cleaning up of ours helps. The truth is what lies in
the directories then.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervise import durable
from supervise.dispatch import records, spool
from supervise.dispatch.backlog import Backlog, Offer
from supervise.dispatch.backoff import Backoff
from supervise.dispatch.policy import MAX_RETRIES, Policy, Retry
from supervise.dispatch.source import ClaimLost
from supervise.dispatch.spool import Bad, Gone, Half, Held, Spool
from supervise.dispatch.task import Attempt
from tests.strategies import Dropped, dropped_tasks

LIMIT = 3
POLICY = Policy(max_attempts=LIMIT, backoff=Backoff(base=1, cap=4), quota_pause=1, longest_quota_pause=1)
START = 1_800_000_000.0
NEVER = sys.maxsize

# --- the disk ------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The worker is dead."""


class Disk:
    """Counts the steps that change something; dies, or refuses once, at the one numbered `at` (from 0).

    Attributes:
        steps: each as its name and the path that it was made on.
        unseen: changes that the interpreter tells of and that did not come through here.
    """

    MUTATING = ("rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir", "fsync", "ftruncate")
    MUTATING += ("truncate", "write", "pwrite", "chmod", "fchmod", "utime")
    AUDITED = frozenset(
        {"os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}
        | {"os.utime", "os.chown", "shutil.rmtree", "shutil.move", "shutil.copyfile"}
    )

    def __init__(self, at: int = NEVER, *, refuses: bool = False) -> None:
        self.steps: list[tuple[str, str]] = []
        self.unseen: list[tuple[str, Any]] = []
        self._at = at
        self._refuses = refuses
        self._expected = 0

    def step(self, name: str, path: Any) -> None:
        number = len(self.steps)
        self.steps.append((name, str(path)))
        if number == self._at and self._refuses:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        if number >= self._at and not self._refuses:
            raise Crash

    def told(self, event: str, args: tuple[Any, ...]) -> None:
        """By the interpreter, of what it does."""
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in self.AUDITED or writes:
            if self._expected:
                self._expected -= 1
            else:
                self.unseen.append((event, args))

    @contextlib.contextmanager
    def under(self) -> Iterator[Disk]:
        """All that is done in this block goes through here."""
        global _active
        kept = {name: getattr(os, name) for name in (*self.MUTATING, "open")}
        ours = {name: self._stepping(name, kept[name]) for name in self.MUTATING} | {
            "open": self._opening(kept["open"])
        }
        vars(os).update(ours)
        renameat2 = durable._renameat2
        vars(durable).update({"open": self._file, "_renameat2": self._renaming(renameat2)})
        _active = self
        try:
            yield self
        finally:
            _active = None
            del vars(durable)["open"]
            vars(durable)["_renameat2"] = renameat2
            vars(os).update(kept)
        assert not self.unseen, "changes that the test does not see"

    def _stepping(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(what: Any, *args: Any, **more: Any) -> Any:
            self.step(name, os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else what)
            self._expected = 0 if name in ("fsync", "write", "pwrite") else 1
            try:
                return real(what, *args, **more)
            finally:
                self._expected = 0

        return call

    def _renaming(self, real: Callable[[bytes, bytes], int]) -> Callable[[bytes, bytes], int]:
        """The interpreter tells nothing of a call of the C library."""

        def call(old: bytes, new: bytes) -> int:
            self.step("rename", os.fsdecode(old))
            return real(old, new)

        return call

    def _opening(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *args: Any, **more: Any) -> int:
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            # To open a file for reading can be refused as well, though there is nothing to die of.
            if writes or self._refuses:
                self.step("open", path)
            self._expected = 1 if writes else 0
            try:
                return real(path, flags, *args, **more)
            finally:
                self._expected = 0

        return call

    def _file(self, descriptor: int, mode: str, **more: Any) -> Any:
        self._expected = 1
        try:
            return _File(self, open(descriptor, mode, **more))
        finally:
            self._expected = 0


class _File:
    """Each write is a step, and the first one writes half."""

    def __init__(self, disk: Disk, file: Any) -> None:
        self._disk = disk
        self._file = file
        self._writes = 0

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()

    def write(self, data: memoryview) -> int:
        self._disk.step("write", os.readlink(f"/proc/self/fd/{self._file.fileno()}"))
        self._writes += 1
        return int(self._file.write(data if self._writes > 1 else data[: len(data) // 2]))

    def fileno(self) -> int:
        return int(self._file.fileno())


_active: Disk | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _active is not None:
        _active.told(event, args)


sys.addaudithook(_hook)  # for good: there is no way to take one back


# --- what lies there -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory in memory, if there is one."""
    memory = Path("/dev/shm")
    where = Path(tempfile.mkdtemp(prefix="spool-", dir=memory if os.access(memory, os.W_OK) else None))
    yield where
    shutil.rmtree(where)


def contents(directory: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in sorted(directory.iterdir())}


def serial_in(data: bytes) -> int | None:
    """Which of the files that were dropped this is, or tells of."""
    try:
        found = json.loads(data.decode("utf-8-sig"))["serial"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return int(found)


def census(each: Spool) -> Counter[tuple[str, int]]:
    """Where each serial is."""
    found: Counter[tuple[str, int]] = Counter()
    for directory in (each.tasks, each.running, each.results, each.dlq):
        for name, data in contents(directory).items():
            serial = serial_in(data)
            if serial is not None and not name.startswith("."):
                found[directory.parent.name, serial] += 1
    return found


# --- one worker's files, driven as the worker does it ---------------------------------------------------------


def died(held: Held, now: float) -> Attempt:
    return Attempt(attempt=len(held.attempts) + 1, ended=now, failure_kind="killed", error="the worker died")


def fail(of: Spool, held: Held, now: float) -> None:
    """What becomes of a task after a failed attempt."""
    attempt = died(held, now)
    decision = POLICY.after_failure(held.task, attempt.attempt, now=now, chance=0.0)
    if isinstance(decision, Retry):
        of.retry(held, (*held.attempts, attempt), decision.at)
    else:
        of.bury(held, letter(of, held, decision.reason, now))


def letter(of: Spool, held: Held, reason: str, now: float) -> dict[str, Any]:
    return records.dead_letter(held.task, of.worker, (*held.attempts, died(held, now)), reason, "", now)


def result(held: Held) -> dict[str, Any]:
    told = {"task_id": held.task.task_id, "serial": held.task.fields["serial"], "status": "completed"}
    return {**told, "attempt": len(held.attempts) + 1}


def see_to_the_dead(of: Spool, now: float) -> None:
    for held in list(of.recover()):
        fail(of, held, now)


class World:
    """One worker, who dies and comes back, and what must be true of its files all the time."""

    def __init__(self, root: Path, kind: type[Spool] = Spool, worker: str = "w") -> None:
        self.kind = kind
        self.spool = kind(root, worker)
        self.spool.create()
        self.rival = kind(root, worker)
        self.now = START
        self.dropped = 0
        self.serials: dict[int, Dropped] = {}
        self.halves: dict[str, tuple[int, bytes]] = {}  # by name: inode, and what is to be written at last
        self.refused: Counter[bytes] = Counter()
        self.ended: dict[Path, bytes] = {}  # what was published
        self.claims: Counter[int] = Counter()
        self.releases: Counter[int] = Counter()
        self.held: list[tuple[Spool, Held]] = []
        self._forget()

    def _forget(self) -> None:
        """As a worker that starts."""
        self.backlog = Backlog()
        self.offers: dict[str, tuple[int, Offer]] = {}
        self.names: dict[str, str] = {}
        self.arrivals = 0
        self.held.clear()

    # --- what others do ------------------------------------------------------------------------------------

    def drop(self, what: Dropped, *, half: bool = False) -> None:
        serial = self.dropped = self.dropped + 1
        data = what.data(serial)
        path = self.spool.tasks / what.name
        if os.path.lexists(path) or what.name in self.halves:
            return  # clients that write over each other's files have lost them themselves
        self.serials[serial] = what
        if half:
            path.write_bytes(data[: len(data) // 2])
            self.halves[what.name] = path.stat().st_ino, data
        else:
            new = path.with_name(f".{what.name}.new")
            new.write_bytes(data)
            # No two are of one moment: on some file systems, an inode is used again at once.
            os.utime(new, ns=(serial * 10**9, serial * 10**9))
            new.rename(path)

    def go_on_writing(self) -> None:
        for name, (inode, data) in self.halves.items():
            path = self.spool.tasks / name
            if path.exists() and path.stat().st_ino == inode:  # else it was refused: its writer took too long
                path.write_bytes(data)
                os.utime(path, ns=((serial_in(data) or 0) * 10**9,) * 2)
        self.halves.clear()

    # --- what the worker does --------------------------------------------------------------------------------

    def look(self, *, grace_is_over: bool) -> None:
        there = set(self.spool.names())
        for name in [name for name in self.offers if name not in there]:
            self._unknow(name)
        for name in sorted(there - self.offers.keys()):
            seen = self.spool.look(name)
            data = (self.spool.tasks / name).read_bytes()
            serial = serial_in(data)
            match seen:
                case Offer():
                    seen = attrs.evolve(seen, not_before=max(seen.not_before, seen.retry_at))
                    assert serial is not None
                    assert self.serials[serial].is_valid
                    other = self.names.get(seen.task_id)
                    if other is not None:
                        self._refuse(Bad(name, "taken", seen.task_id), data)
                        continue
                    assert not self._uses(seen.task_id), "its id is in use"
                    self.arrivals += 1
                    self.offers[name] = (self.arrivals, seen)
                    self.names[seen.task_id] = name
                    self.backlog.add(seen)
                case Half():
                    assert serial is None
                    if grace_is_over:
                        self._refuse(Bad(name, seen.reason), data)
                case Bad():
                    dropped = self.serials.get(serial or 0)
                    is_ours = dropped is not None and dropped.is_valid
                    assert not is_ours or self._uses(str(seen.task_id)), f"a good task was refused: {seen}"
                    self._refuse(seen, data)
                case Gone():
                    raise AssertionError("nobody else is here")

    def _uses(self, task_id: str) -> bool:
        paths = [self.spool.results / f"{task_id}.json", self.spool.running / f"{task_id}.json"]
        return any(path.exists() for path in paths)

    def _refuse(self, bad: Bad, data: bytes) -> None:
        self.refused[data] += 1
        self._unknow(bad.name)
        self.spool.quarantine(bad, records.no_task(bad.name, bad.task_id, "w", bad.reason, self.now))

    def _unknow(self, name: str) -> None:
        self.backlog.remove(name)
        if name in self.offers:
            del self.names[self.offers.pop(name)[1].task_id]

    def claim(self, by: Spool) -> None:
        offer = self.backlog.next(self.now)
        ready = [(-each.priority, at, each.key) for at, each in self.offers.values() if each.not_before <= self.now]
        if offer is None:
            assert not ready
            return
        assert offer.key == min(ready)[2], "higher priority first, then arrival"
        self._unknow(offer.key)
        serial = serial_in((self.spool.tasks / offer.key).read_bytes())
        try:
            held = by.claim(offer.key, offer.task_id)
        except Crash:
            if serial is not None and not (self.spool.tasks / offer.key).exists():
                self.claims[serial] += 1
            raise
        if held is not None:
            assert serial is not None
            assert held.task.fields["serial"] == serial
            self.claims[serial] += 1
            self.held.append((by, held))

    def end(self, how: str, which: int) -> None:
        if not self.held:
            return
        by, held = self.held.pop(which % len(self.held))
        serial = int(held.task.fields["serial"])
        counted = self.claims[serial] - self.releases[serial]
        assert len(held.attempts) + 1 == counted, "each attempt is counted, and counted once"
        assert counted <= LIMIT
        match how:
            case "finish":
                by.finish(held, result(held))
            case "fail":
                fail(by, held, self.now)
            case "bury":
                by.bury(held, letter(by, held, "auth", self.now))
            case _:
                try:
                    by.release(held)
                finally:
                    self.releases[serial] += not (self.spool.running / f"{held.task.task_id}.json").exists()

    def steal(self) -> None:
        """Somebody takes a file out of running/: what comes of the attempt is not published."""
        if self.held:
            by, held = self.held.pop()
            (self.spool.running / f"{held.task.task_id}.json").unlink()
            before = contents(self.spool.results), contents(self.spool.dlq), contents(self.spool.tasks)
            ends: list[Callable[[], Any]] = [
                lambda: by.finish(held, result(held)),
                lambda: by.retry(held, (), 0.0),
                lambda: by.bury(held, {}),
                lambda: by.release(held),
            ]
            for each in ends:
                with pytest.raises(ClaimLost):
                    each()
            assert before == (contents(self.spool.results), contents(self.spool.dlq), contents(self.spool.tasks))
            del self.serials[int(held.task.fields["serial"])]

    def crash(self, do: Callable[[], None], at: int, again: Sequence[int]) -> bool:
        """Do something, and die at step `at` of it; then start anew, and die there, too, once for each of `again`.

        Returns whether it got so far as to die.
        """
        try:
            with Disk(at).under():
                do()
        except Crash:
            dead = True
        else:
            dead = False
        for each in (*again, NEVER):
            self._forget()
            self.spool = self.kind(self.spool.root, self.spool.worker)
            self.rival = self.kind(self.spool.root, self.spool.worker)
            with contextlib.suppress(Crash), Disk(each).under():
                see_to_the_dead(self.spool, self.now)
        for directory in self._directories():
            assert not [name for name in os.listdir(directory) if name.startswith(".")], "a part of a file is left"
        assert not os.listdir(self.spool.running), "a claim is left"
        # What was being set aside when the worker died has come back to tasks/, or is refused.
        self.refused = Counter(path.read_bytes() for path in self.spool.dlq.glob("*.raw"))
        return dead

    def _directories(self) -> tuple[Path, ...]:
        each = self.spool
        return (each.tasks, each.running, each.results, each.dlq, each.triggers)

    # --- what must be true ---------------------------------------------------------------------------------

    def check(self) -> None:
        found = census(self.spool)
        places: Counter[int] = Counter()
        for (_, serial), count in found.items():
            places[serial] += count
        unwritten = {serial_in(data) for _, data in self.halves.values()}
        torn = {serial for serial, what in self.serials.items() if serial_in(what.data(serial)) is None}
        for serial in self.serials:
            if serial not in unwritten and serial not in torn and places[serial] != 1:
                # A half that was refused stays a half, also if a crash has put it back under another name.
                half = self.serials[serial].data(serial)
                lying = [*self.refused, *contents(self.spool.tasks).values()]
                assert any(data and half.startswith(data) for data in lying), (serial, found)
        for path, data in self.ended.items():
            assert path.read_bytes() == data, "what was published has changed"
        for directory in (self.spool.results, self.spool.dlq):
            self.ended |= {directory / name: data for name, data in contents(directory).items() if name[0] != "."}
        raws = {path.name: path.read_bytes() for path in self.spool.dlq.glob("*.raw")}
        assert Counter(raws.values()) == self.refused, "the bytes of what was refused are intact"
        for path in self.spool.dlq.glob("*.json"):
            record = json.loads(path.read_bytes())
            if "file" in record:
                assert record["file"] in raws
                assert record["dlq_reason"] == "invalid_format"
                continue
            attempts = [each["attempt"] for each in record["attempts"]]
            serial = record["serial"]
            assert attempts == list(range(1, self.claims[serial] - self.releases[serial] + 1))
            assert len(attempts) <= LIMIT
            assert (record["dlq_reason"] == MAX_RETRIES) <= (len(attempts) == LIMIT)
        for data in contents(self.spool.results).values():
            record = json.loads(data)
            assert record["attempt"] == self.claims[record["serial"]] - self.releases[record["serial"]] <= LIMIT

    def drive_to_the_end(self) -> None:
        self.go_on_writing()
        self.now = START + 1e6
        while self.held:
            self.end("fail", 0)
        self.now *= 2
        for _ in range(10 * len(self.serials) + 10):
            self.look(grace_is_over=True)
            if not self.offers:
                break
            self.claim(self.spool)
            self.end("finish", 0)
        self.check()
        assert not os.listdir(self.spool.tasks)
        assert not os.listdir(self.spool.running)
        ids = [json.loads(data)["task_id"] for data in contents(self.spool.results).values()]
        assert len(ids) == len(set(ids))


# --- the machine ---------------------------------------------------------------------------------------------


@attrs.frozen
class Do:
    """One thing that happens; `crash` is the step at which the worker dies of it, `again` those of its next lives."""

    what: str
    task: Dropped | None = None
    number: int = 0
    crash: int = NEVER
    again: tuple[int, ...] = ()


WHATS = ["look", "look", "look twice", "claim", "claim", "claim", "rival claims", "finish", "fail", "fail", "bury"]
WHATS += ["release", "steal", "go on writing", "clock", "start"]

steps = st.integers(0, 14)
crashes = st.one_of(st.just(NEVER), st.just(NEVER), steps)
deeds = st.one_of(
    st.builds(Do, what=st.sampled_from(["drop", "drop", "drop half"]), task=dropped_tasks),
    st.builds(
        Do,
        what=st.sampled_from(WHATS),
        number=st.integers(-3, 5),
        crash=crashes,
        again=st.lists(steps, max_size=2).map(tuple),
    ),
)
lives = st.lists(deeds, min_size=8, max_size=40)


def live(place: Path, life: Sequence[Do], kind: type[Spool] = Spool) -> None:
    """All of it, in one directory; the check after each step."""
    root = Path(tempfile.mkdtemp(dir=place))
    try:
        world = World(root, kind)
        for each in life:
            step(world, each)
            world.check()
        world.drive_to_the_end()
    finally:
        shutil.rmtree(root)


def step(world: World, do: Do) -> None:
    act: dict[str, Callable[[], None]] = {
        "look": lambda: world.look(grace_is_over=False),
        "look twice": lambda: world.look(grace_is_over=True),
        "claim": lambda: world.claim(world.spool),
        "rival claims": lambda: world.claim(world.rival),
        "steal": world.steal,
        "go on writing": world.go_on_writing,
        "start": lambda: None,
    }
    match do.what:
        case "drop" | "drop half":
            assert do.task is not None
            world.drop(do.task, half=do.what == "drop half")
        case "clock":
            world.now += do.number * 2.0
        case "steal" | "go on writing":
            act[do.what]()
        case "start":
            world.crash(act["start"], 0, do.again)
        case _:
            deed = act.get(do.what, lambda: world.end(do.what, do.number))
            if do.crash == NEVER:
                deed()
            else:
                world.crash(deed, do.crash, do.again)


QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(QUIET, max_examples=60)
@given(lives)
def test_each_task_ends_once_wherever_the_worker_dies(place: Path, life: list[Do]) -> None:
    live(place, life)


@settings(QUIET, max_examples=8)
@given(lives, lives)
def test_workers_of_two_names_keep_out_of_each_others_way(place: Path, one: list[Do], other: list[Do]) -> None:
    root = Path(tempfile.mkdtemp(dir=place))
    try:
        worlds = World(root), World(root, worker="x")
        for pair in zip(one, other, strict=False):
            for world, each in zip(worlds, pair, strict=True):
                step(world, each)
                world.check()
        for world in worlds:
            world.drive_to_the_end()
        done = {path.stem for path in root.glob("results/*/*.json")}
        assert worlds[0].spool.completed([*done, "nobody"]) == (done, None)
    finally:
        shutil.rmtree(root)


# --- each operation, each step -------------------------------------------------------------------------------


@attrs.frozen
class Operation:
    """Something that a spool is asked to do, in a world where it can be done.

    Attributes:
        attempts: so many have failed before.
        do: is asked with the world, and with the claim if `is_claimed`.
    """

    do: Callable[[World], Any]
    is_claimed: bool = True
    attempts: int = 0
    bad: bool = False


def recovered(world: World) -> None:
    see_to_the_dead(world.spool, world.now)
    world.held.clear()


OPERATIONS = {
    "claim": Operation(lambda world: world.claim(world.spool), is_claimed=False),
    "claim of a retry": Operation(lambda world: world.claim(world.spool), is_claimed=False, attempts=1),
    "finish": Operation(lambda world: world.end("finish", 0)),
    "retry": Operation(lambda world: world.end("fail", 0)),
    "second retry": Operation(lambda world: world.end("fail", 0), attempts=1),
    "bury": Operation(lambda world: world.end("fail", 0), attempts=LIMIT - 1),
    "bury at once": Operation(lambda world: world.end("bury", 0)),
    "release": Operation(lambda world: world.end("release", 0)),
    "release of a retry": Operation(lambda world: world.end("release", 0), attempts=1),
    "quarantine": Operation(lambda world: world.look(grace_is_over=True), is_claimed=False, bad=True),
    "recovery": Operation(lambda world: recovered(world)),
    "last recovery": Operation(lambda world: recovered(world), attempts=LIMIT - 1),
}
TASK = Dropped("x.json", {"task_id": "a", "description": "d" * 100}, is_valid=True)
NO_TASK = Dropped("x.json", {"task_id": "a", "description": ""}, is_valid=False)


@contextlib.contextmanager
def prepared(place: Path, operation: Operation, kind: type[Spool] = Spool) -> Iterator[World]:
    root = Path(tempfile.mkdtemp(dir=place))
    try:
        world = World(root, kind)
        # Dead letters and files of this id are there already: their names are not free.
        (world.spool.dlq / "a.json").write_text('{"task_id": "a", "serial": 0, "attempts": [], "dlq_reason": "auth"}')
        world.drop(NO_TASK if operation.bad else TASK)
        for _ in range(operation.attempts):
            world.look(grace_is_over=False)
            world.claim(world.spool)
            world.end("fail", 0)
            world.now += 100
        if not operation.bad:
            world.look(grace_is_over=False)
        if operation.is_claimed:
            world.claim(world.spool)
        world.check()
        yield world
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize("name", OPERATIONS)
def test_death_at_any_step_and_at_any_step_of_the_next_start(place: Path, name: str) -> None:
    die_everywhere(place, OPERATIONS[name])


def die_everywhere(place: Path, operation: Operation, kind: type[Spool] = Spool) -> None:
    with prepared(place, operation, kind) as world, Disk().under() as disk:
        operation.do(world)
    assert disk.steps
    for at in range(len(disk.steps)):
        for again in range(len(recovery_steps(place, operation, at, kind)) + 1):
            with prepared(place, operation, kind) as world:
                assert world.crash(lambda world=world: operation.do(world), at, [again])
                world.check()
                world.drive_to_the_end()


def recovery_steps(place: Path, operation: Operation, at: int, kind: type[Spool]) -> list[tuple[str, str]]:
    """What a start does after a death at that step."""
    with prepared(place, operation, kind) as world:
        with contextlib.suppress(Crash), Disk(at).under():
            operation.do(world)
        with Disk().under() as disk:
            see_to_the_dead(kind(world.spool.root, "w"), world.now)
    return disk.steps


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_the_disk_refuses_can_be_asked_again(place: Path, name: str) -> None:
    refuse_everywhere(place, OPERATIONS[name])


def refuse_everywhere(place: Path, operation: Operation, kind: type[Spool] = Spool) -> None:
    for at in range(60):
        with prepared(place, operation, kind) as world:
            before = attrs.evolve(Kept(), held=tuple(world.held), refused=world.refused.copy())
            offer = world.backlog.next(world.now)
            try:
                with Disk(at, refuses=True).under():
                    operation.do(world)
            except OSError:
                # As the dispatcher does it: the same claim, the same offer, once more.
                world.held = list(before.held)
                world.refused = before.refused
                world.releases.clear()
                if offer is not None:
                    held = world.spool.claim(offer.key, offer.task_id)
                    assert held is not None, "a task that could not be claimed cannot be asked for again"
                    world.held = [(world.spool, held)]
                    world.claims[int(held.task.fields["serial"])] += 1
                else:
                    with contextlib.suppress(ClaimLost):  # the file was put back, its directory was not on the disk
                        operation.do(world)
            else:
                assert at > 1
                return
            assert not [path for path in world.spool.root.rglob(".*") if path.is_file()], "a part of a file is left"
            world.check()
            if operation.is_claimed or operation.bad:
                assert not os.listdir(world.spool.running)
            else:
                assert world.held, "a task that could not be claimed still waits"
            assert len(os.listdir(world.spool.tasks)) <= 1, "a task is there twice"
            world.drive_to_the_end()
    raise AssertionError("an operation of more than 60 steps")


@attrs.frozen
class Kept:
    held: tuple[tuple[Spool, Held], ...] = ()
    refused: Counter[bytes] = attrs.Factory(Counter)


@pytest.mark.parametrize(("name", "where"), [("finish", "results"), ("retry", "tasks"), ("bury", "dlq")])
def test_an_end_is_on_the_disk_before_its_claim_is_given_up(place: Path, name: str, where: str) -> None:
    with prepared(place, OPERATIONS[name]) as world:
        with Disk().under() as disk:
            OPERATIONS[name].do(world)
        directory = world.spool.root / where / "w"
        running = world.spool.running / "a.json"
    (new,) = {path for what, path in disk.steps if what == "open" and Path(path).parent == directory}
    seen = [(what, path) for what, path in disk.steps if what not in ("open", "write")]
    assert seen == [("fsync", new), ("rename", new), ("fsync", str(directory)), ("unlink", str(running))]


# --- the tests find what they are made to find ------------------------------------------------------------------


class BelievesNoEnd(Spool):  # type: ignore[misc]  # final
    def _has_ended(self, held: Held) -> bool:
        return False


class GivesUpTheClaimFirst(Spool):  # type: ignore[misc]  # final
    def finish(self, held: Held, record: Any) -> None:
        self._drop(held)
        self._publish(self.results / f"{held.task.task_id}.json", {**record, "claim": held.token})


class KeepsTheClaim(Spool):  # type: ignore[misc]  # final
    def _drop(self, held: Held) -> None:
        pass


class LeavesParts(Spool):  # type: ignore[misc]  # final
    def _clear_unfinished_writes(self) -> None:
        pass


class PutsNothingBack(Spool):  # type: ignore[misc]  # final
    def recover(self) -> Iterator[Held]:
        for path in self.running.iterdir():
            held = self._held(path)
            assert held is not None
            yield held


class ForgetsWhatCameBefore(Spool):  # type: ignore[misc]  # final
    def retry(self, held: Held, attempts: tuple[Attempt, ...], at: float) -> str:
        return super().retry(held, attempts[-1:] if len(attempts) > 1 else (), at)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (BelievesNoEnd, "finish"),
        (BelievesNoEnd, "bury at once"),
        (GivesUpTheClaimFirst, "finish"),
        (KeepsTheClaim, "retry"),
        (LeavesParts, "finish"),
        (PutsNothingBack, "quarantine"),
        (ForgetsWhatCameBefore, "second retry"),
    ],
)
def test_a_broken_spool_is_found(place: Path, kind: type[Spool], name: str) -> None:
    with pytest.raises((AssertionError, ClaimLost)):
        die_everywhere(place, OPERATIONS[name], kind)


def test_a_spool_that_writes_over_what_is_there_is_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_free", lambda directory, stem, token="": directory / f"{stem}.json")
    with pytest.raises(AssertionError):
        die_everywhere(place, OPERATIONS["bury"])


@pytest.mark.parametrize("name", ["retry", "bury"])
def test_a_spool_that_publishes_twice_when_asked_again_is_found(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = spool._free
    monkeypatch.setattr(spool, "_free", lambda directory, stem, token="": free(directory, stem))
    with pytest.raises(AssertionError):
        refuse_everywhere(place, OPERATIONS[name])


def test_a_worker_without_a_limit_is_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.property.test_spool.POLICY", attrs.evolve(POLICY, max_attempts=LIMIT + 1))
    with pytest.raises(AssertionError):
        die_everywhere(place, OPERATIONS["last recovery"])


def test_a_change_that_goes_past_the_disk_is_found(place: Path) -> None:
    path = place / "unseen"
    real = os.rename
    path.touch()
    with pytest.raises(AssertionError, match="does not see"), Disk().under():
        real(path, place / "renamed")
    (place / "renamed").unlink()
