"""Rows of the table that `python -m benchmarks` prints."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One measurement against its peer, both taken in the same run."""

    what: str
    ours: str
    peer: str
    ratio: str
    budget: str
    met: bool | None

    def __str__(self) -> str:
        met = {True: "yes", False: "**no**", None: "–"}[self.met]
        return "| " + " | ".join((self.what, self.ours, self.peer, self.ratio, self.budget, met)) + " |"


HEAD = "| what | supervise | peer | ratio | budget | met |\n|---|---|---|---|---|---|"
