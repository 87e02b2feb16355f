"""The stream-json parser against `orjson.loads` over the same recorded lines, and a line of 100 MB.

`python -m benchmarks.parser`

Two peers. "bare" is handed the lines already cut, parses each and drops it: no reader of a pipe can be that
fast. "reader" does the least that a reader must: it cuts the same chunks into lines, parses each and returns
what it got. The parser does that and makes a typed event of each line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import orjson

from benchmarks.table import Row
from supervise.agents.stream_json import MAX_LINE, StreamJsonParser

__all__ = ["measure"]

RUNS = Path(__file__).parents[1] / "tests/data/claude_runs.jsonl"
REPEAT = 10  # of the recorded lines: 3.6 MB
CHUNK = 64 * 1024
ROUNDS, PER_ROUND = 5, 9
MB = 1_000_000
LONG_LINE = 100 * MB


def measure() -> list[Row]:
    """The rows of this benchmark. The ratio of the first two is of speeds: more is better."""
    return [*_speed(), *_long_line()]


def _speed() -> list[Row]:
    lines = _recorded() * REPEAT
    stream = b"".join(line + b"\n" for line in lines)
    chunks = [stream[at : at + CHUNK] for at in range(0, len(stream), CHUNK)]

    def ours() -> None:
        parser = StreamJsonParser()
        for chunk in chunks:
            parser.feed(chunk)
        parser.close()

    def bare() -> None:
        for line in lines:
            orjson.loads(line)

    def reader() -> None:
        rest = b""
        for chunk in chunks:
            *whole, rest = (rest + chunk).split(b"\n")
            [orjson.loads(line) for line in whole]

    our_time, bare_time, reader_time = (seconds / len(lines) * 1e6 for seconds in _interleaved(ours, bare, reader))
    return [
        Row(
            what=f"stream-json parsing, {len(lines)} recorded lines in chunks of {CHUNK // 1024} KiB",
            ours=f"{our_time:.1f} µs a line",
            peer=f"{bare_time:.1f} µs (orjson.loads of each line, already cut)",
            ratio=f"{bare_time / our_time:.2f} × its speed",
            budget="≥ 0.5 × its speed",
            met=bare_time / our_time >= 0.5,
        ),
        Row(
            what="the same",
            ours=f"{our_time:.1f} µs a line",
            peer=f"{reader_time:.1f} µs (chunks cut into lines, orjson.loads, kept)",
            ratio=f"{reader_time / our_time:.2f} × its speed",
            budget="none set",
            met=None,
        ),
    ]


def _interleaved(*works: Callable[[], None]) -> list[float]:
    """Seconds that each work takes: turn by turn, so that a noisy machine is noisy for all; best median."""
    best = [float("inf")] * len(works)
    for _ in range(ROUNDS):
        taken: list[list[float]] = [[] for _ in works]
        for _ in range(PER_ROUND):
            for number, work in enumerate(works):
                start = time.perf_counter()
                work()
                taken[number].append(time.perf_counter() - start)
        best = [min(a, median(b)) for a, b in zip(best, taken, strict=True)]
    return best


def _recorded() -> list[bytes]:
    return [
        orjson.dumps(line)
        for run in RUNS.read_bytes().splitlines()
        for line in orjson.loads(run)["lines"]
        if line["type"] != "NONJSON"
    ]


# --- a long line: in a process of its own, whose peak of resident memory is its own ------------------------------


def _long_line() -> list[Row]:
    rows: list[Row] = []
    for name, max_line in (("below", 2 * LONG_LINE), ("above", MAX_LINE)):
        command = [sys.executable, "-m", "benchmarks.parser", "long-line", str(max_line)]
        done = subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[1])
        found = json.loads(done.stdout)
        # Parsed, a line is there three times: as held, in orjson, and as the text of its event.
        bound = 4 * LONG_LINE if name == "below" else max_line * 5 / 4
        rows.append(
            Row(
                what=f"a line of {LONG_LINE // MB} MB, {name} max_line: {found['event']}",
                ours=f"{found['peak'] / MB:.0f} MB at the peak, {found['seconds']:.2f} s",
                peer=f"{LONG_LINE // MB} MB (the line)",
                ratio=f"{found['peak'] / LONG_LINE:.1f} ×",
                budget=f"≤ {bound / MB:.0f} MB",
                met=found["peak"] <= bound,
            )
        )
    return rows


def _take_long_line(max_line: int) -> None:
    parser = StreamJsonParser(max_line)
    piece = b"x" * CHUNK
    before = _peak_rss()
    start = time.perf_counter()
    events = parser.feed(b'{"type":"result","is_error":false,"result":"')
    for _ in range(LONG_LINE // CHUNK):
        events += parser.feed(piece)
    events += parser.feed(b'"}\n')
    seconds = time.perf_counter() - start
    (event,) = events
    print(json.dumps({"event": event.type, "seconds": seconds, "peak": _peak_rss() - before}))


def _peak_rss() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: this benchmark needs Linux")


def main() -> None:
    if sys.argv[1:2] == ["long-line"]:
        _take_long_line(int(sys.argv[2]))
        return
    for row in measure():
        print(row)


if __name__ == "__main__":
    main()
