"""`python -m supervise`, and the script `supervise`."""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType


def main() -> None:
    """The command line. Exits with its code."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # for what does not wait for them itself
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    try:
        code = _run()
    except KeyboardInterrupt:  # before or after there was anything to cancel
        code = 130
    sys.exit(code)


def _end(number: int, frame: FrameType | None) -> None:
    """At once, with the exit code that a shell would tell: nothing is under way that had to be taken down."""
    os._exit(128 + number)


def _run() -> int:
    from importlib.util import find_spec

    from supervise.cli.streams import mend_standard_streams
    from supervise.errors import MissingExtra

    mend_standard_streams()
    gc.disable()  # what is imported stays: looking for garbage in it is a tenth of a short command
    for package in ("cyclopts", "rich", "structlog", "typed_settings"):
        if find_spec(package) is None:  # not imported: the help needs the half of them
            print(f"supervise: {MissingExtra('the command line', 'cli', package.replace('_', '-'))}", file=sys.stderr)
            return 2
    from supervise.cli.app import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    main()
