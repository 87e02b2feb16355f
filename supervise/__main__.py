"""`python -m supervise`, and the script `supervise`."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line. Exits with its code."""
    try:
        code = _run()
    except KeyboardInterrupt:  # before or after there was anything to cancel
        code = 130
    sys.exit(code)


def _run() -> int:
    from supervise.cli.streams import mend_standard_streams
    from supervise.errors import MissingExtra

    mend_standard_streams()
    for package in ("cyclopts", "rich", "typed_settings"):
        try:
            __import__(package)
        except ImportError:
            print(f"supervise: {MissingExtra('the command line', 'cli', package.replace('_', '-'))}", file=sys.stderr)
            return 2
    from supervise.cli.app import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    main()
