"""Events in words: every event has a printable line of its own, or none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervise import events as e
from supervise.model import IndexStatus, JobResult, Outcome
from supervise.observe.describe import describe
from tests.strategies import events, events_of

MOODS = {"good", "bad", "warn", ""}
EVIL = "\x1b[2J\x1b]0;title\x07one\r\ntwo\x00\x85\u2028three\ud800"


def check(event: e.Event, workspace: str = "") -> None:
    line = describe(event, workspace)
    if line is None:
        return
    who, what, mood = line
    assert mood in MOODS
    for text in (who, what):
        assert text.isprintable(), ascii(text)
        assert len(text) <= 300


@given(events, st.sampled_from(["", "/", "/tmp/w"]))
def test_every_event_can_be_told(event: e.Event, workspace: str) -> None:
    check(event, workspace)


@pytest.mark.parametrize("name", sorted(e.EVENT_TYPES))
def test_each_type_can_be_told(name: str) -> None:
    @settings(max_examples=20)  # there are many types
    @given(events_of(e.EVENT_TYPES[name]))
    def told(event: e.Event) -> None:
        check(event)

    told()


@pytest.mark.parametrize(
    "event",
    [
        e.JobStarted(workspace=EVIL, agent=EVIL, index=EVIL, containment=EVIL),
        e.CancelRequested(reason=EVIL, step=2),
        e.ProcessStarted(role=EVIL, pid=1, program=EVIL),
        e.OutputTruncated(role="agent", stream="stdout", reason=EVIL),
        e.IndexChanged(state="Failed", cause="exited", status=IndexStatus.STALE, reason=EVIL),
        e.IndexOutput(kind="error", line=EVIL),
        e.ReconcileFinished(ok=False, seconds=1.0, reason=EVIL),
        e.AgentInit(session_id=EVIL, model=EVIL),
        e.AgentText(text=EVIL),
        e.AgentToolUse(id="1", name=EVIL, input={"command": EVIL}),
        e.AgentToolUse(id="1", name="Odd", input={EVIL: [EVIL]}),
        e.AgentToolResult(text=EVIL, is_error=True),
        e.AgentRetry(error=EVIL),
        e.AgentPermissionDenied(tool=EVIL, message=EVIL),
        e.AgentResult(text=EVIL),
        e.AgentResult(is_error=True, errors=(EVIL, EVIL)),
        e.AgentOutput(stream="stderr", line=EVIL),
        e.BadLine(reason=EVIL, excerpt=EVIL, size=9),
    ],
)
def test_control_characters_of_others_do_not_reach_a_terminal(event: e.Event) -> None:
    line = describe(event)
    assert line is not None
    assert all(text.isprintable() for text in line)
    assert "one" in " ".join(line)


def test_long_texts_are_cut() -> None:
    line = describe(e.AgentText(text="x" * 1_000_000))
    assert line is not None
    assert 100 < len(line[1]) <= 300
    assert line[1].endswith("…")


def test_paths_in_the_workspace_are_told_as_relative_ones() -> None:
    event = e.AgentToolUse(id="1", name="Edit", input={"file_path": "/home/me/w/src/a.py"})
    assert describe(event, "/home/me/w") == ("agent", "Edit src/a.py", "")
    assert describe(event) == ("agent", "Edit /home/me/w/src/a.py", "")
    start = e.JobStarted(workspace="/home/me/w", agent="claude", index="none", containment="group")
    assert "/home/me/w:" in str(describe(start, "/home/me/w"))


def test_what_is_not_known_is_not_made_up() -> None:
    assert describe(e.AgentResult(text="ok")) == ("agent", "done: ok", "good")
    assert describe(e.AgentResult(text="ok", num_turns=1, cost_usd=0.5)) == (
        "agent",
        "done after 1 turn, $0.5000: ok",
        "good",
    )
    assert "None" not in str(describe(e.AgentRetry()))
    assert "None" not in str(describe(e.AgentInit()))


@pytest.mark.parametrize("outcome", Outcome)
def test_the_end_says_how(outcome: Outcome) -> None:
    line = describe(e.JobFinished(result=JobResult(job_id="j", outcome=outcome)))
    assert line is not None
    assert line[1].startswith(outcome.value)
    assert line[2] == ("good" if outcome is Outcome.COMPLETED else "bad")


def test_what_only_clutters_is_left_out() -> None:
    assert describe(e.ProcessStarted(role="stamp", pid=1, program="git")) is None
    assert describe(e.AgentPartial(text="a")) is None
