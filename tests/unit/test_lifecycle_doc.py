"""docs/lifecycle.md says what the tables say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from supervise.index import diagram
from supervise.index.lifecycle import ENDS, FINAL, TABLE, Event, State

DOCUMENT = Path(__file__).parents[2] / "docs" / "lifecycle.md"


def test_the_document_is_current() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert diagram.updated(text) == text, "run: python -m supervise.index.diagram --write docs/lifecycle.md"


def test_the_diagram_is_the_table() -> None:
    rows = set()
    for source, target, events in re.findall(r"^    (\w+) --> (\w+): (.+)$", diagram.mermaid(), re.MULTILINE):
        rows |= {(State(source), Event(event), State(target)) for event in events.split(", ")}
    assert rows == {(source, event, target) for (source, event), target in TABLE.items()}
    assert re.findall(r"\[\*\] --> (\w+)", diagram.mermaid()) == ["NotStarted"]
    assert set(re.findall(r"(\w+) --> \[\*\]", diagram.mermaid())) == {state.value for state in FINAL}


def test_the_prose_knows_all_endings_and_events() -> None:
    prose = DOCUMENT.read_text("utf-8")
    for number, end in enumerate(ENDS, 1):
        assert f"\n{number}. **{end.name}**: " in prose
    for event in Event:
        assert f"\n| {event.value} | " in prose


def test_a_change_is_noticed_and_mended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "copy.md"
    copy.write_text(DOCUMENT.read_text("utf-8"), "utf-8")
    monkeypatch.setitem(diagram.TABLE, (State.RUNNING, Event.FAILED), State.FAILED)
    old = copy.read_text("utf-8")
    assert diagram.updated(old) != old
    assert diagram.main(["--write", str(copy)]) == 0
    new = copy.read_text("utf-8")
    assert diagram.updated(new) == new
    assert "Running --> Failed: exited, failed" in new


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert diagram.main([]) == 0
    assert capsys.readouterr().out == diagram.mermaid()
    assert diagram.main(["--help"]) == 2
    assert "usage" in capsys.readouterr().err


def test_markers_that_are_missing_are_told() -> None:
    with pytest.raises(ValueError, match="<!-- diagram: generated -->"):
        diagram.updated("nothing here")
