"""The directories of one worker, and every change that is made in them. Blocking calls, no Trio, no clock.

    tasks/<worker>/<any name>.json     waits; `<id>~retry.json` was written by us, for another attempt
    running/<worker>/<id>.json         is claimed
    results/<worker>/<id>.json         ended
    dlq/<worker>/<id>.json             a dead letter; one that was no task has its own bytes beside it, `<id>.raw`
    triggers/<worker>/<id>.trigger     was received
    heartbeats/<worker>.json

A task is in exactly one of tasks, running, results and dlq, but for moments in which it is in two, and each of these
moments is told apart at the next start (`recover`). A claim is one rename out of tasks. It ends by writing the new
file (result, dead letter, or the task with its history) first and removing the running one then; the new file carries
the claim's token (inode and time of the running file), so that a crash in between is no second attempt. Nothing is
ever overwritten: a second task of an id that waits, runs or has a result is a dead letter.

`~` is in no task id, so that the names that we make up are nobody else's.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, final

from attrs import frozen

from supervise import durable
from supervise.codec import loads, to_line
from supervise.dispatch.backlog import Offer
from supervise.dispatch.source import ClaimLost
from supervise.dispatch.task import MAX_BYTES, Attempt, Task, Unfinished, Waited, fields_of, of_fields, waited
from supervise.errors import BadInput, SuperviseError

__all__ = ["Bad", "Gone", "Half", "Held", "Spool"]

TASK: Final = ".json"
RETRY: Final = "~retry"
#: Of a task that we wrote for another attempt: with its history, and not as terse as it came.
OWN_BYTES: Final = 16 * MAX_BYTES
#: A larger result tells nobody that its task has completed.
RESULT_BYTES: Final = 256 * MAX_BYTES
#: Before the umask: whoever may look into the directory may read what is in it.
MODE: Final = 0o666
_IN_HAND: Final = "in hand"
#: As `durable.replace` names what it writes. A thread that dies in it leaves such a file.
UNFINISHED: Final = re.compile(r"\..+\.[0-9a-f]{8}", re.DOTALL)
DIRECTORIES: Final = ("tasks", "running", "triggers", "results", "dlq")


@frozen
class Gone:
    """The file is not there any more."""

    name: str


@frozen
class Half:
    """A file that does not parse, perhaps not yet. `version` changes with its content, `seen` is what was looked at."""

    name: str
    version: tuple[int, int]
    reason: str
    seen: tuple[int, int]


@frozen
class Bad:
    """A file that is no task, and never will be. `seen` is what was looked at; another file may have come since."""

    name: str
    reason: str
    task_id: str | None = None
    seen: tuple[int, int] | None = None


@frozen(kw_only=True)
class Held:
    """A claimed task. `token` is of this claim alone; `inode` is of its file."""

    task: Task
    attempts: tuple[Attempt, ...]
    token: str
    inode: int


@final
class Spool:
    """See the module.

    Args:
        root: the directory that holds tasks/, running/ …
        worker: its name, checked.

    Every method raises `OSError` where the disk does; then nothing is lost, and it may be called again.
    """

    def __init__(self, root: Path, worker: str) -> None:
        self.root = root
        self.worker = worker
        self.tasks, self.running, self.triggers, self.results, self.dlq = (root / name / worker for name in DIRECTORIES)
        self.heartbeat = root / "heartbeats" / f"{worker}.json"
        self._begun: dict[str, str] = {}  # claims that were broken off behind their rename: names by task id

    def create(self) -> None:
        """Make the directories. Raises SuperviseError where they cannot be, or cannot be used."""
        try:
            for path in (*self._own(), self.heartbeat.parent, self.root / "triggers" / "orchestrator"):
                path.mkdir(parents=True, exist_ok=True)
                durable.sync_directory(path.parent)
            durable.sync_directory(self.root)
            for path in (*self._own(), self.heartbeat.parent):
                if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, "no right to write there", str(path))
            apart = [path for path in self._own() if path.stat().st_dev != self.tasks.stat().st_dev]
        except OSError as error:
            what = error.filename or self.root
            raise SuperviseError(
                f"the worker's directory {what} cannot be used: {error.strerror}; name another root (worker.root)"
            ) from None
        if apart:
            raise SuperviseError(
                f"{apart[0]} lies on another file system than {self.tasks}: nothing can be renamed there"
            )

    def make_again(self) -> None:
        """Make directories that somebody has removed; but not the root, in whose place another one may come."""
        if all(path.is_dir() for path in (*self._own(), self.heartbeat.parent)):
            return
        if not self.root.is_dir():
            raise SuperviseError(f"the worker's root {self.root} is gone: put it back, or start the worker anew")
        self.create()

    # --- what is there ------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The files in tasks/ that may be tasks, the oldest first.

        But before them those that we wrote: their ids were theirs before anybody's.
        """
        found: list[tuple[bool, int, str]] = []
        with os.scandir(self.tasks) as entries:
            for entry in entries:
                if is_task_name(entry.name):
                    try:
                        age = entry.stat(follow_symlinks=False).st_mtime_ns
                    except FileNotFoundError:
                        continue
                    found.append((RETRY not in entry.name, age, entry.name))
        return [name for _, _, name in sorted(found)]

    def complete_at_birth(self, names: Iterable[str]) -> list[str]:
        """Those of the new files that nobody will close after writing: hard links, and what is no regular file.

        A link that has lost its other name looks like any other file: what is whole is taken for one.
        """
        found: list[str] = []
        for name in names:
            try:
                info = (self.tasks / name).lstat()
                is_written = info.st_nlink == 1 and stat.S_ISREG(info.st_mode)
                if is_written and (not info.st_size or isinstance(self.look(name), Half)):
                    continue
            except OSError:  # gone; or the sweep sees it
                continue
            found.append(name)
        return found

    def look(self, name: str) -> Offer | Half | Bad | Gone:
        """What the file in tasks/ is."""
        read = self._read(self.tasks / name)
        if isinstance(read, Bad | Gone):
            return read
        data, info = read
        try:
            found = waited(fields_of(data, most=OWN_BYTES))
            task = of_fields(found.fields)
        except Unfinished as error:
            return Half(name, (info.st_size, info.st_mtime_ns), str(error), _identity(info))
        except BadInput as error:
            return Bad(name, str(error), seen=_identity(info))
        if task.worker is not None and task.worker != self.worker:
            reason = (
                f"it is for the worker {task.worker[:80]!r}, not for {self.worker!r}; put it into tasks/ of that one"
            )
            return Bad(name, reason, task.task_id, _identity(info))
        if reason := self._taken(task.task_id, found.claim):
            # That it is taken may be by itself: it was claimed since it was read, and perhaps has ended.
            if reason is _IN_HAND or not _is_still(self.tasks / name, _identity(info)):
                return Gone(name)
            return Bad(name, reason, task.task_id, _identity(info))
        return Offer(
            key=name,
            task_id=task.task_id,
            priority=task.priority,
            dependencies=task.dependencies,
            not_before=task.not_before,
            attempts=len(found.attempts),
            retry_at=found.at,
            pause=found.pause,
        )

    def _taken(self, task_id: str, claim: str) -> str:
        """Why another task of this id may not run: empty if it may."""
        if os.path.lexists(self.results / f"{task_id}.json"):
            return f"the task id {task_id!r} is taken: there is a result of it; choose another"
        try:
            running = (self.running / f"{task_id}.json").lstat().st_ino
        except FileNotFoundError:
            return ""
        # `retry` is between its two steps, and tells of the file when it is done.
        return (
            _IN_HAND
            if claim.startswith(f"{running}-")
            else f"the task id {task_id!r} is taken: it is running; choose another"
        )

    def completed(self, task_ids: Iterable[str]) -> tuple[set[str], OSError | None]:
        """Those of the tasks that have completed, whichever worker did them; and what could not be read, if so."""
        wanted, found = set(task_ids), set[str]()
        refused: OSError | None = None
        with os.scandir(self.results.parent) as workers:
            for directory in [Path(each.path) for each in workers if each.is_dir()]:
                for task_id in wanted - found:
                    try:
                        if _is_completed(directory / f"{task_id}.json"):
                            found.add(task_id)
                    except OSError as error:
                        refused = error
        return found, refused

    # --- a claim, and its ends ----------------------------------------------------------------------------

    def claim(self, name: str, task_id: str) -> Held | None:
        """Take a task: from here on it is ours. None if it is gone, or is another one by now.

        Called again after an error, it goes on where it was broken off.
        """
        running = self.running / f"{task_id}.json"
        if self._begun.get(task_id) != name:
            if os.path.lexists(self.results / f"{task_id}.json"):  # what came of this task would overwrite it
                return None
            try:
                durable.rename_new(self.tasks / name, running)
            except FileExistsError:
                return None
            except FileNotFoundError:
                if os.path.lexists(self.tasks / name):  # it is running/ that has gone
                    raise _gone(self.running) from None
                return None
            self._begun[task_id] = name
            with suppress(PermissionError):  # whose file is not ours; see `_token`
                os.utime(running)
        durable.sync_directory(self.running)
        durable.sync_directory(self.tasks)
        held = self._held(running)
        if held is None or held.task.task_id != task_id:  # changed since it was looked at
            self._put_back(running, name.removesuffix(TASK))
            held = None
        self._begun.pop(task_id, None)
        return held

    def give_up_begun(self) -> None:
        """Put back what was claimed by half: nobody will ask for it again."""
        for task_id, name in tuple(self._begun.items()):
            with suppress(FileNotFoundError):
                self._put_back(self.running / f"{task_id}.json", name.removesuffix(TASK))
            self._begun.pop(task_id, None)

    def finish(self, held: Held, record: Mapping[str, Any]) -> None:
        """Publish the result. Raises ClaimLost."""
        self._require(held)
        self._publish(self.results / f"{held.task.task_id}.json", {**record, "claim": held.token})
        self._drop(held)

    def retry(self, held: Held, attempts: tuple[Attempt, ...], at: float, pause: float = 0.0) -> str:
        """Put the task back with its history, for `at` (seconds since the epoch) or later. Raises ClaimLost.

        `pause` is how far off that is, in seconds. Returns the name that it has in tasks/ now; so does `release`.
        """
        self._require(held)
        path = _free(self.tasks, held.task.task_id + RETRY, held.token)
        state = Waited(fields=dict(held.task.fields), attempts=attempts, at=at, pause=pause, claim=held.token)
        self._publish(path, state.to_fields())
        self._drop(held)
        return path.name

    def bury(self, held: Held, record: Mapping[str, Any]) -> None:
        """Make a dead letter of the task. Raises ClaimLost."""
        self._require(held)
        self._publish(_free(self.dlq, held.task.task_id, held.token), {**record, "dlq_claim": held.token})
        self._drop(held)

    def drop_ended(self, task_id: str, token: str) -> None:
        """Remove the running file of a claim whose end is on the disk, if a kill has left it."""
        path = self.running / f"{task_id}.json"
        with suppress(FileNotFoundError):
            if token and _token(path.lstat()) == token:
                path.unlink()
                durable.sync_directory(self.running)

    def release(self, held: Held) -> str:
        """Put the task back as it was. Raises ClaimLost."""
        self._require(held)
        return self._put_back(self._running(held), held.task.task_id + (RETRY if held.attempts else ""))

    def quarantine(self, bad: Bad, record: Mapping[str, Any]) -> bool:
        """Set a file aside that is no task: a record, and beside it its bytes. Returns False if it is gone.

        The record comes first: should it not fit on the disk, nothing has moved, and nobody is told of a change.
        """
        path = self.tasks / bad.name
        if bad.seen is not None and not _is_still(path, bad.seen):
            return False
        stem = _free_stem(self.dlq, bad.task_id or _safe(bad.name.removesuffix(TASK)))
        reason, raw = self.dlq / f"{stem}.json", self.dlq / f"{stem}.raw"
        try:
            self._publish(reason, {**record, "file": raw.name})
            durable.rename_new(path, raw)
        except FileNotFoundError:
            reason.unlink(missing_ok=True)
            if not self.dlq.is_dir():
                raise _gone(self.dlq) from None
            return False
        except OSError:
            reason.unlink(missing_ok=True)
            raise
        if bad.seen is not None and not _is_still(raw, bad.seen):  # another file has come since
            self._put_back(raw, bad.name.removesuffix(TASK))
            reason.unlink(missing_ok=True)
            return False
        with suppress(OSError):  # it is done; should a power cut take that back, the file is looked at again
            durable.sync_directory(self.dlq)
            durable.sync_directory(self.tasks)
        return True

    # --- after a crash ------------------------------------------------------------------------------------

    def recover(self) -> Iterator[Held]:
        """The tasks whose attempt a dead worker has left without an end.

        To be called by whoever holds the worker's lock, alone, before anything is looked at. What had ended is
        cleared away; what is no claimed task goes back to tasks/, to be looked at as all that lies there.
        """
        self._begun.clear()
        self._clear_unfinished_writes()
        for raw in self.dlq.glob("*.raw"):
            if not os.path.lexists(raw.with_suffix(TASK)):  # it was on its way back (`dlq retry`)
                self._put_back(raw, raw.name.removesuffix(".raw"))
        for reason in self.dlq.glob(f"*{TASK}"):
            if not os.path.lexists(reason.with_suffix(".raw")) and _names_bytes(reason):
                reason.unlink()  # it was being set aside, or dropped
        for path in sorted(self.running.iterdir()):
            held = self._held(path)
            if held is None or path.name != held.task.task_id + TASK:
                self._put_back(path, path.name.removesuffix(TASK))
            elif self._has_ended(held):
                path.unlink()
            else:
                yield held

    def _clear_unfinished_writes(self) -> None:
        for directory in (self.running, self.results, self.dlq, self.triggers, self.tasks):
            for name in os.listdir(directory):
                ours = RETRY in name if directory == self.tasks else True  # others write there, too
                if ours and UNFINISHED.fullmatch(name) and not (directory / name).is_dir():
                    (directory / name).unlink(missing_ok=True)

    def clear_unfinished_beats(self) -> None:
        """Of a dead worker: before the first beat of ours."""
        for name in os.listdir(self.heartbeat.parent):
            if name.startswith(f".{self.heartbeat.name}.") and UNFINISHED.fullmatch(name):
                (self.heartbeat.parent / name).unlink(missing_ok=True)

    def _has_ended(self, held: Held) -> bool:
        """Whether the claim's end is on the disk."""
        task_id = held.task.task_id
        if os.path.lexists(self.results / f"{task_id}.json"):
            return True
        left = [self.dlq / f"{task_id}.json", *self.dlq.glob(f"{task_id}~*{TASK}")]
        left += self.tasks.glob(f"{task_id}{RETRY}*{TASK}")
        return any(_token_in(path) == held.token for path in left)

    # --- small things -------------------------------------------------------------------------------------

    def beat(self, record: Mapping[str, Any]) -> None:
        """Replace the heartbeat."""
        data = to_line(record)
        try:
            durable.replace(self.heartbeat, data, durable=False, mode=MODE)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _overwrite(self.heartbeat, data)

    def trigger(self, task_id: str, record: Mapping[str, Any]) -> None:
        """Tell that the task was received; once, also if it is looked at again."""
        path = self.triggers / f"{task_id}.trigger"
        if not path.exists():
            durable.replace(path, to_line(record), durable=False, mode=MODE)

    def _own(self) -> tuple[Path, ...]:
        return (self.tasks, self.running, self.triggers, self.results, self.dlq)

    def _running(self, held: Held) -> Path:
        return self.running / f"{held.task.task_id}.json"

    def _require(self, held: Held) -> None:
        try:
            inode = self._running(held).lstat().st_ino
        except FileNotFoundError:
            if not self.running.is_dir():  # all of it has gone, and may come back
                raise _gone(self.running) from None
            inode = -1
        # Not the time: whoever wrote the file may still have touched it.
        if inode != held.inode:
            raise ClaimLost(
                f"the claim on task {held.task.task_id} was lost: its file in running/ is not ours any more"
            )

    def _publish(self, path: Path, record: Mapping[str, Any]) -> None:
        try:
            durable.replace(path, to_line(record), durable=True, mode=MODE)
        except OSError as error:
            error.filename = os.fspath(path)  # a write(2) does not know it, and the unfinished file is nobody's
            error.filename2 = None
            raise

    def _drop(self, held: Held) -> None:
        """The end is on the disk: should this not be, the next start does it."""
        self._running(held).unlink(missing_ok=True)

    def _put_back(self, path: Path, stem: str) -> str:
        """Under this name, if it is free, or one like it."""
        while True:
            new = _free(self.tasks, stem)
            try:
                durable.rename_new(path, new)
                break
            except FileExistsError:  # somebody was quicker
                continue
        durable.sync_directory(self.tasks)
        durable.sync_directory(path.parent)
        return new.name

    def _held(self, path: Path) -> Held | None:
        """The task in a claimed file; None if it is none."""
        read = self._read(path)
        if isinstance(read, Bad | Gone):
            return None
        data, info = read
        try:
            found = waited(fields_of(data, most=OWN_BYTES))
            return Held(task=of_fields(found.fields), attempts=found.attempts, token=_token(info), inode=info.st_ino)
        except BadInput:
            return None

    def _read(self, path: Path) -> tuple[bytes, os.stat_result] | Bad | Gone:
        """The bytes of a file, at most one more than may be. A device or a pipe is not even opened."""
        name = path.name
        try:
            info = path.lstat()
            if not stat.S_ISREG(info.st_mode):
                return Bad(name, f"it is {_kind(info.st_mode)}, but must be a regular file")
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return Gone(name)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO):
                return Bad(name, f"it cannot be read: {error.strerror}")
            raise
        with open(descriptor, "rb", buffering=0) as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                return Bad(name, f"it is {_kind(info.st_mode)}, but must be a regular file")
            data = b""
            most = OWN_BYTES if RETRY in name or path.parent == self.running else MAX_BYTES
            while len(data) <= most and info.st_size <= most:
                more = file.read(most + 1 - len(data))
                if not more:
                    return data, info
                data += more
        return Bad(name, f"it is larger than {most} bytes; hand over a file's name instead of its content")


def _overwrite(path: Path, data: bytes) -> None:
    """On a full disk, in the room that the old file has: better torn for a moment than silent for hours."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)


def is_task_name(name: str) -> bool:
    """Whether a file of this name may be a task: hidden ones are being written, others are nobody's."""
    return name.endswith(TASK) and not name.startswith(".")


def _gone(directory: Path) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{directory}/")


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_ino, info.st_mtime_ns


def _is_still(path: Path, identity: tuple[int, int]) -> bool:
    """Whether the file there is the one that was seen. An inode alone is soon used again."""
    try:
        return _identity(path.lstat()) == identity
    except FileNotFoundError:
        return False


def _token(info: os.stat_result) -> str:
    """The time is that of the claim, which sets it: an inode is soon used again, and `cp -p` keeps a file's time."""
    return f"{info.st_ino}-{info.st_mtime_ns}"


def _token_in(path: Path) -> str:
    """Of the claim that has left this file behind."""
    try:
        fields = loads(_content(path))
        return waited(fields).claim or str(fields.get("dlq_claim", ""))
    except (BadInput, FileNotFoundError, ValueError, RecursionError, AttributeError):  # a stranger's
        return ""


def _names_bytes(path: Path) -> bool:
    """Whether the record tells of bytes beside it."""
    try:
        fields = loads(_content(path))
    except (FileNotFoundError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.get("file") == path.with_suffix(".raw").name


def _content(path: Path) -> bytes:
    """Of a regular file; empty of anything else, a pipe among it, which would keep us for ever."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ELOOP):  # a socket, a link to itself
            return b""
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return b""
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(RESULT_BYTES + 1)
        return data if len(data) <= RESULT_BYTES else b""
    finally:
        os.close(descriptor)


def _is_completed(path: Path) -> bool:
    try:
        record = loads(_content(path))
    except (FileNotFoundError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.get("status") == "completed"


def _free(directory: Path, stem: str, token: str = "") -> Path:
    """A name in the directory that nobody has, or only the claim of this token, which was broken off there before."""
    path, number = directory / f"{stem}{TASK}", 1
    while os.path.lexists(path) and not (token and _token_in(path) == token):
        number += 1
        path = directory / f"{stem}~{number}{TASK}"
    return path


def _free_stem(directory: Path, stem: str) -> str:
    """One of which neither the record nor the bytes are there."""
    number, free = 1, stem
    while os.path.lexists(directory / f"{free}.json") or os.path.lexists(directory / f"{free}.raw"):
        number += 1
        free = f"{stem}~{number}"
    return free


def _safe(name: str) -> str:
    """A stranger's name as part of ours: no newline, no control character, nothing that is no text, not too long."""
    text = os.fsencode(name).decode("utf-8", "replace")
    plain = "".join(letter if letter.isprintable() and letter not in "/\\~\ufffd" else "_" for letter in text)
    # A name is counted in bytes.
    return plain.lstrip(".").encode()[:100].decode("utf-8", "ignore") or "_"


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"))
    return next((text for test, text in kinds if test(mode)), "a socket or a device")
