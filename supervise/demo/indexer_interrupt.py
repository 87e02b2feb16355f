"""SIGINT as a flag to ask and a descriptor to wait for, in place of an exception from anywhere."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["Interrupt"]


class Interrupt:
    """Takes SIGINT over for the rest of the process; made once, in the main thread.

    Attributes:
        noted: whether SIGINT has come.
    """

    def __init__(self, *, force_quit: bool = False) -> None:
        self.noted = False
        self._force_quit = force_quit
        self._readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # The C level of the handler writes here, so a signal that comes just before poll() ends that poll().
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._note)

    def fileno(self) -> int:
        """A descriptor that is readable from the first SIGINT on."""
        return self._readable

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and self._force_quit:
            # Not print(): it may have been interrupted in the middle of itself.
            os.write(1, b"FORCE QUIT\n")
            os._exit(0)
        self.noted = True
