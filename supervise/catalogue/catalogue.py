"""The catalogue: the scripts below some directories, and what their headers say. Blocking; no Trio.

A name that cannot be read costs nothing but itself: it is told of in `troubles`.
"""

from __future__ import annotations

import difflib
import errno
import os
import shlex
import stat
import threading
import time
from bisect import bisect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, final

import attrs
from attrs import frozen

from supervise.catalogue.header import MAX_NAME, Header, parse
from supervise.errors import BadInput, SuperviseError
from supervise.settings import Settings

__all__ = ["Catalogue", "Lookup", "Match", "Script"]

#: By these a script is known; without one, by its #! line. What its #! line could be.
INTERPRETERS: Final = {
    ".sh": "/bin/sh",
    ".bash": "/usr/bin/env bash",
    ".py": "/usr/bin/env python3",
    ".rb": "/usr/bin/env ruby",
    ".pl": "/usr/bin/env perl",
    ".js": "/usr/bin/env node",
}
SUFFIXES_AND_NONE: Final = frozenset({*INTERPRETERS, ""})

#: So much of a script is read, in bytes: its header is at its beginning.
HEAD: Final = 16 * 1024

#: More scripts are not listed, and more names not looked at.
MOST_SCRIPTS: Final = 100_000
MOST_NAMES: Final = 1_000_000

#: So many scripts of one name are told of by their paths.
MOST_TOLD: Final = 10

#: Directories that hold what others have installed or made.
LEFT_OUT: Final = frozenset({"node_modules", "__pycache__"})

#: How old what a `Lookup` knows may be, in seconds.
MAX_AGE: Final = 2.0

#: So many names are compared with one that nobody knows: all of 100,000 would take a minute.
MOST_COMPARED: Final = 256

#: The machine's trouble or the network's, and not the file's own: what could not be read now can be, later.
PASSING: Final = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOBUFS,
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
    }
)

BOM: Final = b"\xef\xbb\xbf"

Spans = tuple[tuple[int, int], ...]


@frozen(kw_only=True)
class Script:
    """A script of the catalogue.

    Attributes:
        name: what its header says, else its file's name without the suffix.
        path: of the file, absolute.
        place: likewise, from its directory of the catalogue on.
        header: what it says of itself.
        executable: this process may execute it.
        problems: what is wrong with it: of the header, and of what the kernel wants.
        obstacle: why it cannot be started, and what to do; empty if it can, as far as is seen.
    """

    name: str
    path: str
    place: str
    header: Header
    executable: bool
    problems: tuple[str, ...] = ()
    obstacle: str = ""

    def seconds(self, wanted: float | None, default: float) -> float:
        """How long a run of it may take: what is wanted, else what its header says, else the default.

        Raises:
            BadInput: it cannot be started, or what its header says of that is not understood.
        """
        if self.obstacle:
            raise BadInput(f"the script {shown(self.path)} cannot be started: {self.obstacle}")
        if wanted is not None:
            return wanted
        if self.header.limit_problem:
            problem = f"how long the script {shown(self.path)} may run is not known: {self.header.limit_problem}"
            raise BadInput(f"{problem}; mend its header, or give a timeout")
        return default if self.header.limit is None else self.header.limit


@frozen(kw_only=True)
class Match:
    """A script that a search has found, and where: begin and end of each place in the text.

    Attributes:
        script: it.
        name, description: places in them.
        tags: likewise, for each tag.
    """

    script: Script
    name: Spans
    description: Spans
    tags: tuple[Spans, ...]


@final
@frozen(kw_only=True)
class Catalogue:
    """What was found. Made by `read`.

    Attributes:
        scripts: by name, then path.
        troubles: directories and files that could not be read, and bounds that were reached.
        hint: what to do where there is no catalogue: no directory was named, and the default one is not there.
        gaps: why scripts may be missing that are there: directories that could not be read, and trouble of the machine.
        filled: of the directories that were named, those in which there is anything.
    """

    scripts: tuple[Script, ...] = ()
    troubles: tuple[str, ...] = ()
    hint: str = ""
    gaps: tuple[str, ...] = ()
    filled: frozenset[str] = frozenset()

    @classmethod
    def read(cls, directories: Sequence[Path]) -> Catalogue:
        """The scripts below the directories; relative ones lie in the working directory. Never raises OSError."""
        default = attrs.fields(Settings).script_dirs.default
        roots = [os.path.abspath(directory) for directory in directories]
        if tuple(directories) == default and not os.path.lexists(roots[0]):
            return cls(
                hint=f"there is no directory {roots[0]}; make it and put scripts there, or name other directories "
                "(script_dirs, SUPERVISE_SCRIPT_DIRS)"
            )
        reading = _Reading()
        for root in roots:
            reading.walk(root)
        scripts = sorted(reading.scripts, key=lambda script: (script.name.casefold(), script.name, script.path))
        return cls(
            scripts=tuple(scripts),
            troubles=tuple(reading.troubles),
            gaps=tuple(reading.gaps),
            filled=frozenset(reading.filled),
        )

    def find(self, name: str) -> Script:
        """The script of exactly this name, or else at this place: its path, from its directory of the catalogue on.

        Raises:
            BadInput: there is none (with the nearest right name), or there are several.
            SuperviseError: there is none, but not all could be read: there may be one.
        """
        found = self.named(name)
        if len({os.path.realpath(script.path) for script in found}) == 1:  # a link beside its file is no second script
            return found[0]
        if found:
            paths = ", ".join(shown(script.path) for script in found[:MOST_TOLD])
            more = ", …" if len(found) > MOST_TOLD else ""
            raise BadInput(f"there are {len(found)} scripts {name!r}: {paths}{more}; name one by its path")
        if self.gaps:
            raise SuperviseError(f"whether there is a script {name!r} is not known: {self.gaps[0]}; see to that first")
        if self.hint:
            raise BadInput(f"there is no script {name!r}: {self.hint}")
        nearest = _nearest(name[:MAX_NAME], {script.name for script in self.scripts if len(script.name) <= MAX_NAME})
        meant = f"did you mean {nearest[0]!r}?" if nearest else "supervise scripts list tells which there are"
        trouble = f" ({self.troubles[0]})" if self.troubles else ""
        raise BadInput(f"there is no script {name!r} in the catalogue{trouble}; {meant}")

    def named(self, name: str) -> list[Script]:
        """All scripts of this name, or else at this place: in the catalogue, or from the working directory on."""
        by_name = [script for script in self.scripts if script.name == name]
        here = os.path.abspath(name) if "/" in name and "\0" not in name else ""
        return by_name or [script for script in self.scripts if script.place == name or script.path == here]

    def search(self, query: str) -> list[Match]:
        """The scripts whose name, description or one of whose tags holds `query`, whatever the case of its letters.

        In the catalogue's order. White space counts as one space; an empty query finds all.
        """
        wanted = " ".join(query.split()).casefold()
        found = []
        for script in self.scripts:
            header = script.header
            texts = [script.name, header.description, *header.tags]
            # Most scripts do not match: where they do is looked for afterwards.
            if not wanted or any(wanted in text.casefold() for text in texts):
                name, description, *tags = (_places(text, wanted) for text in texts)
                found.append(Match(script=script, name=name, description=description, tags=tuple(tags)))
        return found


@final
class Lookup:
    """Finds scripts again and again, for whoever runs many: the whole catalogue is read every `MAX_AGE` s at most.

    But a name that is not known is looked for in all files anew, and of a script that is known the file itself is read
    again: what was put there or changed just now is seen. What is not seen for so long is a second script of a
    name that is known. A directory that held something and holds nothing now is taken for one that cannot be read: one
    that is not mounted looks so.

    Args:
        directories: as for `Catalogue.read`.
        max_age: seconds. Where reading takes longer than `MAX_AGE`, twice that time.
    """

    def __init__(self, directories: Sequence[Path], max_age: float = MAX_AGE) -> None:
        self._directories = tuple(directories)
        self._filled: set[str] = set()  # directories that held something
        self._max_age = max_age
        self._catalogue: Catalogue | None = None
        self._read_at = 0.0
        self._good_until = 0.0
        self._reading = threading.Lock()  # one reads, the others use what it has found

    def find(self, name: str, asked: float | None = None) -> Script:
        """See `Catalogue.find`; raises as it does. From any thread; blocks while the files are read.

        Args:
            name: the script's.
            asked: since when it is wanted, on `time.monotonic`; default now. What was read since then is new enough.
        """
        asked = time.monotonic() if asked is None else asked
        with self._reading:
            if self._catalogue is not None and asked < self._good_until:
                script = self._known(name)
                if script is not None:
                    return script
            # What somebody else has begun to read since we were called is new enough.
            if self._catalogue is None or self._read_at < asked:
                read_at = time.monotonic()
                self._catalogue = self._whole(Catalogue.read(self._directories))
                self._read_at = read_at
                took = time.monotonic() - read_at
                # One that takes long is believed as long again: who gives up waiting for it finds it the next time.
                self._good_until = read_at + (self._max_age if took < MAX_AGE else 2 * took)
            return self._catalogue.find(name)

    def _whole(self, catalogue: Catalogue) -> Catalogue:
        """As it was read, the directories told that have lost all."""
        lost = sorted(self._filled - catalogue.filled)
        self._filled |= catalogue.filled
        why = "held something before, and nothing now; if that is meant, start the worker anew"
        return attrs.evolve(catalogue, gaps=(*catalogue.gaps, *(f"the directory {shown(each)} {why}" for each in lost)))

    def _known(self, name: str) -> Script | None:
        assert self._catalogue is not None
        old = self._catalogue.named(name)
        if len(old) != 1:
            return None
        reading = _Reading()
        reading.add(old[0].path, old[0].place)
        return next((new for new in reading.scripts if new.name == old[0].name), None)


class _Reading:
    """One walk through the directories."""

    def __init__(self) -> None:
        self.scripts: list[Script] = []
        self.troubles: list[str] = []
        self.gaps: list[str] = []
        self.filled: set[str] = set()
        self._seen: set[tuple[int, int]] = set()  # directories: one may lie below another
        self._names = 0
        self._full = False

    def walk(self, root: str) -> None:
        """All below a directory. Links to directories are not followed, but for the directory itself."""
        todo = [(root, "")]
        before = -1 if self._full else self._names  # of what is left out it is not known, and not told
        while todo and not self._full:
            directory, place = todo.pop()
            try:
                status = os.stat(directory)
                if (status.st_dev, status.st_ino) in self._seen:
                    continue
                self._seen.add((status.st_dev, status.st_ino))
                with os.scandir(directory) as entries:
                    for entry in entries:
                        if self._is_too_much(root):
                            break
                        self._take(entry, place, todo)
            except OSError as error:
                self._miss(f"the directory {shown(directory)} cannot be read: {error.strerror}")
        if self._names > before:
            self.filled.add(root)

    def _miss(self, trouble: str) -> None:
        self.troubles.append(trouble)
        self.gaps.append(trouble)

    def _trouble(self, trouble: str, error: OSError) -> None:
        told = f"{trouble}: {error.strerror}"
        if error.errno in PASSING:
            self._miss(told)
        else:
            self.troubles.append(told)

    def _is_too_much(self, root: str) -> bool:
        self._names += 1
        self._full = self._names > MOST_NAMES or len(self.scripts) >= MOST_SCRIPTS
        if self._full:
            what = f"{MOST_NAMES} files" if self._names > MOST_NAMES else f"{MOST_SCRIPTS} scripts"
            self.troubles.append(f"there are more than {what}; the rest of {shown(root)} is left out")
        return self._full

    def _take(self, entry: os.DirEntry[str], place: str, todo: list[tuple[str, str]]) -> None:
        name = entry.name
        if name.startswith(".") or name in LEFT_OUT:
            return
        try:
            if entry.is_dir(follow_symlinks=False):
                todo.append((entry.path, f"{place}{name}/"))
            # What is no regular file is not even opened: that may wait for somebody, or do something.
            elif _divided(name)[1] in SUFFIXES_AND_NONE and entry.is_file():
                self.add(entry.path, place + name)
        except OSError as error:  # a link in a circle, say
            self._trouble(f"{shown(entry.path)} cannot be looked at", error)

    def add(self, path: str, place: str) -> None:
        """One file, if it is a script."""
        stem, suffix = _divided(place[place.rfind("/") + 1 :])
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except FileNotFoundError:  # it is gone by now, and so may be what would come in its place
            self.gaps.append(f"{shown(path)} went away while it was looked at")
            return
        except OSError as error:
            problem = f"it cannot be read: {error.strerror}"
            if suffix and error.errno not in PASSING:
                unread = Header()
                self._put(path, place, stem, unread, os.access(path, os.X_OK), (problem,), problem)
            else:  # whether it is a script is not known
                self._trouble(f"{shown(path)} cannot be read", error)
            return
        try:
            status = os.fstat(descriptor)
            data = os.read(descriptor, HEAD) if stat.S_ISREG(status.st_mode) else None
        except OSError as error:
            self._trouble(f"{shown(path)} cannot be read", error)
            return
        finally:
            os.close(descriptor)
        if data is None or not (suffix or data.startswith((b"#!", BOM + b"#!"))):
            return
        whole = len(data) < HEAD
        if not whole:  # a line that is cut says something else, perhaps
            data = data[: data.rfind(b"\n") + 1] or data
        header = parse(data.decode("utf-8", "replace"), whole=whole)
        executable = os.access(path, os.X_OK)
        malformed = _malformed(data, suffix)
        obstacle = malformed if executable else _no_execution(path, status.st_mode)
        self._put(path, place, stem, header, executable, (*header.problems, *filter(None, (malformed,))), obstacle)

    def _put(
        self,
        path: str,
        place: str,
        stem: str,
        header: Header,
        executable: bool,
        problems: tuple[str, ...],
        obstacle: str,
    ) -> None:
        self.scripts.append(
            Script(
                name=header.name or stem,
                path=path,
                place=place,
                header=header,
                executable=executable,
                problems=problems,
                obstacle=obstacle,
            )
        )


def _nearest(name: str, names: Iterable[str]) -> list[str]:
    """The name most like this one, if any is. Of many, only those are compared that begin or end as it does."""
    ordered = sorted(names)
    if len(ordered) > MOST_COMPARED:
        share = MOST_COMPARED // 4
        at = bisect(ordered, name)
        near = {*ordered[max(0, at - share) : at + share]}
        backwards = sorted(each[::-1] for each in ordered)
        at = bisect(backwards, name[::-1])
        near |= {each[::-1] for each in backwards[max(0, at - share) : at + share]}
        ordered = sorted(near)
    return difflib.get_close_matches(name, ordered, n=1)


def _divided(name: str) -> tuple[str, str]:
    """Stem and suffix of a name that does not begin with a dot."""
    dot = name.rfind(".")
    return (name, "") if dot < 0 else (name[:dot], name[dot:])


def shown(path: str) -> str:
    """A path in a message: as it is, if it has nothing that would steer a terminal."""
    return path if path.isprintable() else repr(path)


def _no_execution(path: str, mode: int) -> str:
    if mode & 0o111:
        return "it may not be executed by this user, or in this file system (noexec)"
    return f"it is not executable: chmod +x {shlex.quote(path) if path.isprintable() else repr(path)}"


def _malformed(data: bytes, suffix: str) -> str:
    """Why the kernel would not start it; empty if it would, as far as its first line tells."""
    if data.startswith(BOM):
        return "a byte order mark stands before its #! line, which the kernel therefore does not see; take it out"
    if data.startswith(b"#!"):
        ends_so = data.partition(b"\n")[0].endswith(b"\r")
        return "its #! line ends with a carriage return; take it out (dos2unix)" if ends_so else ""
    if data.startswith(b"\x7fELF"):
        return ""
    return f"it has no #! line, by which it would be started; let its first line be #!{INTERPRETERS[suffix]}"


def _places(text: str, wanted: str) -> Spans:
    """Where `wanted`, its case folded, is in `text`. Folding a letter may make several of it."""
    if not wanted:
        return ()
    folded = [letter.casefold() for letter in text]
    whole = "".join(folded)
    origin = [number for number, letters in enumerate(folded) for _ in letters]
    found = []
    at = whole.find(wanted)
    while at >= 0:
        end = at + len(wanted)
        found.append((origin[at], origin[end - 1] + 1))
        at = whole.find(wanted, end)
    return tuple(found)
