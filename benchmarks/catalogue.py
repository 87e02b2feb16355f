"""`supervise scripts list` of 5,000 scripts: the whole command, its output a pipe; and the library's part of it.

The peer reads the same directories with plain Python. The command's peer is itself on an empty catalogue, which is what
its start costs. `python -m benchmarks.catalogue [SCRIPTS]`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.table import Row
from supervise.catalogue.catalogue import Catalogue

SCRIPTS = 5000
ROUNDS = 9
BUDGET = 1.0  # seconds, for the whole command

_KINDS = [(".sh", "#"), (".bash", "#"), (".py", "#"), (".rb", "#"), (".pl", "#"), (".js", "//"), ("", "#")]


def make(root: Path, count: int) -> None:
    """So many scripts in 50 directories, each with a whole header and 100 lines."""
    for number in range(count):
        suffix, comment = _KINDS[number % len(_KINDS)]
        lines = [
            f"name: script-{number:05}",
            f"description: Bring build number {number} to the servers, one after the other,",
            "  and say what was done.",
            "inputs: the build's number",
            "outputs: a report",
            f"tags: deploy, group-{number % 20}",
            "task_class: FAST_SCRIPT",
        ]
        path = root / f"part-{number % 50}" / f"script-{number:05}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        header = "".join(f"{comment} {line}\n" for line in lines)
        path.write_text("#!/bin/sh\n" + header + "\nset -e\n" + "echo a line of the script\n" * 100)
        path.chmod(0o755)


def _read_plainly(root: Path) -> int:
    size = 0
    for directory, _, names in os.walk(root):
        for name in names:
            with open(os.path.join(directory, name), "rb") as file:
                size += len(file.read(16 * 1024))
    return size


def _command(root: Path, state: Path) -> int:
    env = {**os.environ, "SUPERVISE_SCRIPT_DIRS": f'["{root}"]', "SUPERVISE_STATE_DIR": str(state)}
    argv = [sys.executable, "-m", "supervise", "scripts", "list"]
    done = subprocess.run(argv, env=env, capture_output=True, check=True)
    return done.stdout.count(b"\n")


def _seconds(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def _in_turn(ours: Callable[[], object], peer: Callable[[], object]) -> tuple[float, float]:
    """The medians; first both once, so that the files are in memory."""
    ours()
    peer()
    pairs = [(_seconds(ours), _seconds(peer)) for _ in range(ROUNDS)]
    return statistics.median(each for each, _ in pairs), statistics.median(each for _, each in pairs)


def measure(count: int = SCRIPTS) -> list[Row]:
    """The rows of this benchmark."""
    with tempfile.TemporaryDirectory() as scratch:
        root, empty, state = (Path(scratch) / name for name in ("scripts", "empty", "state"))
        make(root, count)
        empty.mkdir()
        assert len(Catalogue.read([root]).scripts) == count
        assert _command(root, state) == count + 1
        read, plain = _in_turn(lambda: Catalogue.read([root]), lambda: _read_plainly(root))
        whole, start = _in_turn(lambda: _command(root, state), lambda: _command(empty, state))
    return [
        Row(
            what=f"the catalogue of {count} scripts, read",
            ours=f"{read * 1000:.0f} ms",
            peer=f"{plain * 1000:.0f} ms (open and read each)",
            ratio=f"{read / plain:.2f} ×",
            budget="none set",
            met=None,
        ),
        Row(
            what=f"`supervise scripts list` of {count} scripts",
            ours=f"{whole * 1000:.0f} ms",
            peer=f"{start * 1000:.0f} ms (of none)",
            ratio=f"{whole / start:.2f} ×",
            budget=f"≤ {BUDGET:g} s",
            met=whole <= BUDGET,
        ),
    ]


if __name__ == "__main__":
    for row in measure(int(sys.argv[1]) if len(sys.argv) > 1 else SCRIPTS):
        print(row, flush=True)
