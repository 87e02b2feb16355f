"""The standard streams as one meets them: closed, blocked, gone, or of an alphabet without arrows."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO, final

#: How long a reader who takes nothing is waited for at the end, in seconds.
PATIENCE = 5.0
#: What may wait for a reader, in characters; past it, what is printed is lost.
BACKLOG = 1024 * 1024
#: Small enough that a slow reader is seen to take something.
CHUNK = 4096

SPELL = "supervise.spell"
_SPELLED = {"→": "->", "…": "...", "·": "-", "–": "-", "—": "-"}


def mend_standard_streams() -> None:
    """Put /dev/null where a standard descriptor is closed, and let no character be an error.

    Otherwise the next file that is opened would get the number of a standard stream.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
    # Python has none where the descriptor was closed at its start; `print` to no stream at all prints elsewhere.
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # for as long as the process lives
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # likewise
    codecs.register_error(SPELL, _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=SPELL)


def on_terminal(stream: object) -> bool:
    """Whether a person looks at this stream on a terminal that can be drawn on.

    rich also takes a pipe for a terminal where FORCE_COLOR is set: for colours that is right; but nothing is to be cut
    there, and nothing drawn over.
    """
    isatty = getattr(stream, "isatty", None)
    return bool(isatty and isatty()) and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


def write_all(descriptor: int, data: bytes, on_progress: Callable[[int], None] = lambda count: None) -> None:
    """Write to a descriptor, also to one that somebody has made non-blocking. Blocks as long as it takes."""
    view = memoryview(data)
    while view:
        try:
            count = os.write(descriptor, view[:CHUNK])
        except BlockingIOError:
            select.select([], [descriptor], [])
            continue
        on_progress(count)
        view = view[count:]


@final
class Screen(io.TextIOBase):
    """A text file for people. Printing to it never waits and never fails: a thread does the writing.

    Args:
        stream: what it stands for; `None` for a stream that is closed.
        on_closed: called once, in that thread, when the reader has gone away.
    """

    def __init__(self, stream: TextIO | None, on_closed: Callable[[], None] = lambda: None) -> None:
        self._descriptor = -1 if stream is None else stream.fileno()
        self._encoding = "utf-8" if stream is None else stream.encoding
        self._on_closed = on_closed
        self._pending: deque[str] = deque()
        self._size = 0
        self._written = 0
        self._news = threading.Condition()
        self._writer: threading.Thread | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]  # an attribute in typeshed
        """For rich, which draws with what there is."""
        return self._encoding

    def isatty(self) -> bool:
        """Whether a person looks at it."""
        return self._descriptor >= 0 and os.isatty(self._descriptor)

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Keep `text` for the writer."""
        with self._news:
            if text and self._descriptor >= 0 and self._size < BACKLOG:
                self._pending.append(text)
                self._size += len(text)
                self._news.notify_all()
                if self._writer is None:
                    self._writer = threading.Thread(target=self._run, name="supervise screen", daemon=True)
                    self._writer.start()
        return len(text)

    def drain(self) -> None:
        """Wait until all is written, as long as the reader takes something every `PATIENCE` seconds."""
        with self._news:
            written, deadline = self._written, time.monotonic() + PATIENCE
            while self._size and (left := deadline - time.monotonic()) > 0:
                self._news.wait(left)
                if written != self._written:
                    written, deadline = self._written, time.monotonic() + PATIENCE

    def _run(self) -> None:
        while True:
            with self._news:
                while not self._pending:
                    self._news.wait()
                text = self._pending.popleft()
            try:
                write_all(self._descriptor, text.encode(self._encoding, SPELL), self._progress)
            except OSError:
                with self._news:
                    self._descriptor, self._size = -1, 0
                    self._news.notify_all()
                self._on_closed()
                return
            with self._news:
                self._size -= len(text)
                self._news.notify_all()

    def _progress(self, count: int) -> None:
        with self._news:
            self._written += count
            self._news.notify_all()


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_SPELLED.get(letter, "?") for letter in error.object[error.start : error.end]), error.end
