"""Keep this process's environment from its children."""

from __future__ import annotations

import ctypes
import sys

PR_SET_DUMPABLE = 4


def hide_environment() -> None:
    """Make `/proc/PID/environ` and the memory of this process unreadable for other processes of the same user.

    See prctl(2), PR_SET_DUMPABLE, and ptrace(2) on access modes. Root reads them all the same: isolation from a
    hostile agent needs another user for the agent.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE) failed")
