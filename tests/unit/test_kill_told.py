"""What the demo says of a killed supervisor: also where its tree, or the mark, was not as promised."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from supervise.cli.kill import KillForPeople, is_as_promised
from supervise.demo.kill import Kill, Mate

MATES = (Mate(7, "sv-guardian"), Mate(8, "python"))
GOOD = Kill(pid=5, mates=MATES, left=(), seconds=0.25, bound=3.0)
BAD = Kill(pid=5, mates=MATES, left=MATES[1:], seconds=0.25, bound=3.0)
MARK = Path("/state/stale.json")


@pytest.mark.parametrize(
    ("kill", "mark", "good"),
    [(GOOD, MARK, True), (BAD, MARK, False), (GOOD, None, False)],
)
def test_only_an_empty_tree_and_a_mark_are_as_promised(kill: Kill, mark: Path | None, good: bool) -> None:
    assert is_as_promised(kill, mark) is good
    said = io.StringIO()
    KillForPeople(Console(file=said, width=200)).tell(kill, mark)
    text = said.getvalue()
    assert "kill -9 5: " in text
    assert "7 sv-guardian, 8 python" in text
    assert ("the tree is empty: all 2 ended within 0.25 s" in text) is (kill is GOOD)
    assert ("after 3 s these were still alive, and ended by the demo: 8 python" in text) is (kill is BAD)
    assert ("this is a bug in supervise" in text) is (mark is None)
