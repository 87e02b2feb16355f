"""The files of a workspace as the index sees them: regular files, read whole or not at all.

Paths are texts relative to the workspace, with `/` between the parts; the workspace itself is `""`.
Every file is reached part by part below an open directory, and no part may be a symbolic link: the agent may
replace a directory by a link at any moment, and what lies outside the workspace is not the index's business.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

__all__ = [
    "IGNORED",
    "INDEX_DIRECTORY",
    "LARGEST_TEXT",
    "Changed",
    "Content",
    "Stamp",
    "is_absent",
    "is_directory",
    "join",
    "list_directory",
    "open_below",
    "read_file",
    "shown",
    "walk",
]

INDEX_DIRECTORY = ".code-indexer"
IGNORED = frozenset({".git", INDEX_DIRECTORY})
LARGEST_TEXT = 10 * 1024 * 1024  # bytes; a larger file is known by its digest only

# How the kernel says that there is no such file, or that a part of its path is a link or no directory,
# or that it is a socket or a device without a driver.
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV})
_CHUNK = 1024 * 1024
# The kernel's clock for file times ticks every 1-10 ms: a file that changed just now can change again
# without its stamp saying so.
_YOUNG_NS = 100_000_000


class Stamp(NamedTuple):
    """What tells, without reading it, whether a file has changed.

    `ctime_ns` cannot be set back; `inode` tells two files apart that were made in one tick of the clock and
    whose directories were swapped.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def lasting(self) -> Stamp:
        """This stamp if it can be trusted later on, else one that equals no file's."""
        young = time.time_ns() - self.ctime_ns < _YOUNG_NS
        return self._replace(ctime_ns=-1) if young else self


class Content(NamedTuple):
    """A file as it was read."""

    digest: str  # SHA-256 of the bytes
    text: str
    stamp: Stamp


class Changed(Exception):
    """A file changed while it was being read."""


def is_absent(error: OSError) -> bool:
    """Whether `error` says that there is nothing to index here, rather than that it failed."""
    return error.errno in _ABSENT


def join(directory: str, name: str) -> str:
    """The path of `name` in `directory`."""
    return f"{directory}/{name}" if directory else name


def shown(path: str) -> str:
    """`path` for one line of output: whatever its bytes are, printable and without line ends."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _text_of(data: bytes) -> str:
    """`data` as full text. What is no UTF-8, and NUL, becomes the replacement character."""
    return data.decode("utf-8", "replace").replace("\0", "\ufffd")


def open_below(root: int, path: str, flags: int) -> int:
    """Open `path` below the directory descriptor `root`, following no link in any part of it."""
    *parents, name = path.split("/")
    parent = root
    try:
        for part in parents:
            child = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            if parent != root:
                os.close(parent)
            parent = child
        return os.open(name or ".", flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    finally:
        if parent != root:
            os.close(parent)


def is_directory(root: int, path: str) -> bool:
    """Whether `path` is a directory now, and no link to one."""
    try:
        os.close(open_below(root, path, os.O_PATH | os.O_DIRECTORY))
    except OSError as error:
        if is_absent(error):
            return False
        raise
    return True


def list_directory(fd: int) -> tuple[list[str], list[tuple[str, Stamp]]]:
    """Names of the directories, and names and stamps of the regular files, in an open directory."""
    directories: list[str] = []
    files: list[tuple[str, Stamp]] = []
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.name in IGNORED:
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # removed since the directory was read
                continue
            if stat.S_ISDIR(status.st_mode):
                directories.append(entry.name)
            elif stat.S_ISREG(status.st_mode):
                files.append((entry.name, Stamp.of(status)))
    return sorted(directories), sorted(files)


def walk(root: int, top: str, failed: Callable[[str, OSError], None]) -> Iterator[tuple[str, Stamp]]:
    """The files at any depth below the directory `top`; `failed` hears of directories that cannot be read."""
    waiting = [top]
    while waiting:
        directory = waiting.pop()
        try:
            fd = open_below(root, directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                directories, files = list_directory(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if not is_absent(error):
                failed(directory, error)
            continue
        for name, stamp in files:
            yield join(directory, name), stamp
        waiting.extend(join(directory, name) for name in reversed(directories))


def read_file(root: int, path: str, check: Callable[[], None]) -> Content | None:
    """The content of the regular file `path`; `None` if there is no such file (any more).

    `check` is called before each chunk, and may raise to stop the reading of a large file.

    Raises:
        Changed: the file changed while it was being read.
        OSError: the file is there and cannot be read.
    """
    try:
        fd = open_below(root, path, os.O_RDONLY | os.O_NONBLOCK)  # non-blocking: it may be a FIFO
    except OSError as error:
        if is_absent(error):
            return None
        raise
    digest = hashlib.sha256()
    kept = bytearray()
    done = 0
    try:
        before = os.fstat(fd)
        if not stat.S_ISREG(before.st_mode):
            return None
        stamp = Stamp.of(before)
        check()
        # A file that grows as fast as it is read would have no end: the size seen first is the bound.
        while done <= stamp.size and (chunk := os.read(fd, _CHUNK)):
            check()
            digest.update(chunk)
            done += len(chunk)
            if stamp.size <= LARGEST_TEXT:
                kept += chunk
        if done != stamp.size or Stamp.of(os.fstat(fd)) != stamp:
            raise Changed(path)
    finally:
        os.close(fd)
    return Content(digest.hexdigest(), _text_of(bytes(kept)), stamp.lasting())
