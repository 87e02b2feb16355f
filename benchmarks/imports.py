"""`import supervise` and `supervise --help` against `import trio`, each in fresh interpreters, in turn."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.table import Row

ROUNDS = 25


HELP = ("-m", "supervise", "--help")


def _seconds(*words: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def measure() -> list[Row]:
    """The rows of this benchmark; of the imports, the bare interpreter's start is taken out of both sides."""
    samples: dict[str, list[float]] = {"pass": [], "import trio": [], "import supervise": [], "run": []}
    helps: list[float] = []
    codes = {name: name for name in samples} | {"run": "import supervise; supervise.run_job"}
    for _ in range(ROUNDS):
        for name, code in codes.items():
            samples[name].append(_seconds("-c", code))
        helps.append(_seconds(*HELP))
    low = {name: statistics.median(values) for name, values in samples.items()}
    shown, whole = statistics.median(helps), low["import trio"]
    trio, ours, used = (low[name] - low["pass"] for name in ("import trio", "import supervise", "run"))
    return [
        Row(
            what="import supervise",
            ours=f"{ours * 1000:.1f} ms",
            peer=f"{trio * 1000:.1f} ms (import trio)",
            ratio=f"{ours / trio:.2f} ×",
            budget="≤ 1.3 ×",
            met=ours / trio <= 1.3,
        ),
        Row(
            what="import supervise, and first use of run_job",
            ours=f"{used * 1000:.1f} ms",
            peer=f"{trio * 1000:.1f} ms (import trio)",
            ratio=f"{used / trio:.2f} ×",
            budget="none set",
            met=None,
        ),
        Row(
            what="supervise --help, the whole process",
            ours=f"{shown * 1000:.0f} ms",
            peer=f'{whole * 1000:.0f} ms (python -c "import trio")',
            ratio=f"{shown / whole:.2f} ×",
            budget="≤ 2.5 ×",
            met=shown / whole <= 2.5,
        ),
    ]


if __name__ == "__main__":
    for row in measure():
        print(row)
