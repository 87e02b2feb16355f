"""Documents that are made of the definitions: a part of each, between two markers, is written by a program."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["main", "with_part"]


def with_part(text: str, begin: str, end: str, made: str) -> str:
    """`text` with `made` between its two markers.

    Raises:
        ValueError: the markers are not there.
    """
    before, begins, rest = text.partition(begin)
    _, ends, after = rest.partition(end)
    if not (begins and ends):
        raise ValueError(f"the markers are missing: {begin} and {end}")
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


def main(argv: Sequence[str], program: str, make: Callable[[], str], renew: Callable[[str], str]) -> int:
    """Print what is made, or write it into a document; the exit code.

    Args:
        argv: nothing, or `--write FILE`.
        program: what is run, for its usage.
        make: makes the part.
        renew: makes a document with that part of one with an older.
    """
    if len(argv) == 2 and argv[0] == "--write":
        path = Path(argv[1])
        path.write_text(renew(path.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    if argv:
        print(f"use: python -m {program} [--write FILE]", file=sys.stderr)
        return 2
    print(make())
    return 0
