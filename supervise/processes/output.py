"""What a child prints: always drained, bounded in memory and on disk, secrets masked first."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, final

from supervise.secrets import MaskedStream


@final
class BoundedLog:
    """A log file of at most `limit` bytes: past that, its first half and at least the last quarter are kept.

    Args:
        path: the file; an old one is replaced. Mode 0600.
        limit: bytes.
        on_trouble: called once, with a reason, when bytes are left out or the disk refuses them.
    """

    def __init__(self, path: Path, limit: int, on_trouble: Callable[[str], None]) -> None:
        self._path = path
        self._head_room = limit // 2
        self._segment = max(1, limit // 4)
        self._on_trouble = on_trouble
        self._told = False
        self._dropped = 0
        self._tails: deque[Path] = deque()
        self._in_tail = 0
        self._file: IO[bytes] | None = None
        try:
            self._file = self._open(path)
        except OSError as error:
            self._give_up(error)

    def write(self, data: bytes) -> None:
        """Append. Never raises: a full disk must not end a job."""
        if self._file is None:
            return
        try:
            if self._head_room:
                head = data[: self._head_room]
                self._put(head)
                self._head_room -= len(head)
                data = data[len(head) :]
            if data:
                self._write_tail(data)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Put head and tail together. Call once; blocks for as long as copying half of `limit` takes."""
        try:
            if self._file is not None:
                self._file.close()
            if self._tails:  # also what was written before the disk refused more
                with self._open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as log:
                    if self._dropped:
                        log.write(f"\n[… {self._dropped} bytes left out …]\n".encode())
                    for tail in self._tails:
                        with self._open(tail, os.O_RDONLY) as file:
                            shutil.copyfileobj(file, log)
                        tail.unlink()
        except OSError as error:
            self._give_up(error)
        self._file = None

    def _write_tail(self, data: bytes) -> None:
        while data:
            if not self._tails or self._in_tail >= self._segment:
                self._next_tail()
            part = data[: self._segment - self._in_tail]
            self._put(part)
            self._in_tail += len(part)
            data = data[len(part) :]

    def _put(self, data: bytes) -> None:
        """Write all: a disk that gets full takes a part, and tells only when it is asked to take the rest."""
        assert self._file is not None
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def _next_tail(self) -> None:
        if self._file is not None:
            self._file.close()
        if len(self._tails) == 2:
            self._dropped += self._segment
            self._tell("the log is full: head and tail are kept")
            old = self._tails.popleft()
        else:
            old = self._path.with_name(f"{self._path.name}.tail{len(self._tails)}")
        self._file = self._open(old)
        self._tails.append(old)
        self._in_tail = 0

    def _open(self, path: Path, flags: int = os.O_WRONLY | os.O_CREAT | os.O_TRUNC) -> IO[bytes]:
        """Neither follows a planted link nor waits for the other end of a planted FIFO."""
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no regular file")
        return open(descriptor, "wb" if flags & os.O_WRONLY else "rb", buffering=0)

    def _give_up(self, error: OSError) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                # A deferred write error may be told again at close; it is told below already.
                self._file = None
        self._file = None
        self._tell(f"writing the log {self._path} failed: {error.strerror}")

    def _tell(self, reason: str) -> None:
        if not self._told:
            self._told = True
            self._on_trouble(reason)


@final
class Logs:
    """The logs of one job: a file for each role and stream, shared by all trees of the role, one after the other.

    Args:
        directory: where they are.
        limit: bytes of each.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = directory
        self._limit = limit
        self._open: dict[str, BoundedLog] = {}

    def of(self, role: str, stream: str, on_trouble: Callable[[str], None]) -> BoundedLog:
        """The log of a stream; `on_trouble` as for `BoundedLog`, of whoever asks first."""
        name = f"{role}.{stream}.log"
        if name not in self._open:
            self._open[name] = BoundedLog(self._directory / name, self._limit, on_trouble)
        return self._open[name]

    def close(self) -> None:
        """Put the logs together. May block for long: to be called in a thread."""
        for log in self._open.values():
            log.close()


@final
class Tail:
    """The last `limit` bytes of a stream."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: deque[bytes] = deque()
        self._size = 0

    def add(self, data: bytes) -> None:
        if not self._limit or not data:
            return
        self._chunks.append(data[-self._limit :])
        self._size += len(self._chunks[-1])
        while self._size - len(self._chunks[0]) >= self._limit:
            self._size -= len(self._chunks.popleft())
        if len(self._chunks) > 1024:  # many small chunks cost more than they hold
            self._chunks = deque([b"".join(self._chunks)])

    def text(self) -> str:
        data = b"".join(self._chunks)[-self._limit :] if self._limit else b""
        return data.decode("utf-8", "replace")


@final
class Output:
    """One stream of a child: masked, then logged, kept as a tail, and handed to `sink`.

    Attributes:
        size: bytes seen so far.
    """

    def __init__(
        self,
        *,
        mask: MaskedStream,
        tail_bytes: int,
        log: BoundedLog | None = None,
        sink: Callable[[bytes], None] | None = None,
    ) -> None:
        self.size = 0
        self._mask = mask
        self._tail = Tail(tail_bytes)
        self._log = log
        self._sink = sink

    def feed(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self._pass_on(self._mask.feed(chunk))

    def close(self) -> None:
        """The stream has ended: what was held back goes on."""
        self._pass_on(self._mask.close())

    def tail(self) -> str:
        """The end of what was printed; bytes that are not UTF-8 are replaced."""
        return self._tail.text()

    def _pass_on(self, data: bytes) -> None:
        if not data:
            return
        if self._log is not None:
            self._log.write(data)
        self._tail.add(data)
        if self._sink is not None:
            self._sink(data)


@final
class Lines:
    """Cuts a byte stream into lines of text of at most `limit` bytes; the rest of a longer line is dropped."""

    def __init__(self, on_line: Callable[[str], None], limit: int = 64 * 1024) -> None:
        self._on_line = on_line
        self._limit = limit
        self._begun = b""

    def feed(self, data: bytes) -> None:
        first, *more = data.split(b"\n")
        self._begun += first[: self._limit - len(self._begun)]
        for line in more:
            self._out()
            self._begun = line[: self._limit]

    def close(self) -> None:
        """A last line without a newline is a line."""
        if self._begun:
            self._out()

    def _out(self) -> None:
        line, self._begun = self._begun, b""
        self._on_line(line.decode("utf-8", "replace").rstrip("\r"))
