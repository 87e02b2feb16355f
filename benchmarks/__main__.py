"""`python -m benchmarks`: every row measured in this run, as ratios against a peer on this machine."""

from __future__ import annotations

from benchmarks import catalogue, imports, job, parser, processes, worker
from benchmarks.table import HEAD


def main() -> None:
    """Print the table."""
    print(HEAD, flush=True)
    for part in (job, processes, worker, parser, catalogue, imports):
        for row in part.measure():
            print(row, flush=True)


if __name__ == "__main__":
    main()
