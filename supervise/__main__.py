"""`python -m supervise`, and the script `supervise`."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line. Exits with its code."""
    from supervise.errors import MissingExtra

    for package in ("cyclopts", "rich", "typed_settings"):
        try:
            __import__(package)
        except ImportError:
            print(f"supervise: {MissingExtra('the command line', 'cli', package.replace('_', '-'))}", file=sys.stderr)
            sys.exit(2)
    from supervise.cli.app import main as run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
