"""Timelines: what is read from event logs, and how it is drawn as SVG. Pure."""

from __future__ import annotations

import codecs
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich.console import Console

from supervise.cli import streams
from supervise.cli.timeline import _drawn
from supervise.codec import rfc3339, to_line
from supervise.observe import timeline as timeline_module
from supervise.observe.timeline import (
    MOST_LANES,
    Lane,
    Mark,
    Span,
    Timeline,
    clock,
    timeline_of,
    to_json,
)
from supervise.observe.timeline_svg import MOST_SPANS, WIDTH, svg, tick_label, ticks

codecs.register_error(streams.SPELL, streams._spell)  # as each command does at its start

BEGAN = 1_800_000_000.0
HOSTILE = "[/a][b]a<b>&\"'\x00\x1b[31m\ud800\ufffe]]><script>alert(1)</script>\u202e\n\t" + "long " * 500


def event(kind: str, at: float = 0.0, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "time": rfc3339(BEGAN + at), "job_id": "j1", **fields}


def started(at: float, role: str = "agent", pid: int = 7) -> dict[str, Any]:
    return event("process_started", at, role=role, pid=pid, program="prog")


def exited(at: float, role: str = "agent", pid: int = 7, code: int | None = 0, by: str | None = None) -> dict[str, Any]:
    return event("process_exited", at, role=role, pid=pid, exit_code=code, signal=by)


def index(at: float, state: str, reason: str = "") -> dict[str, Any]:
    return event("index", at, state=state, cause="x", status="none", reason=reason)


def finished(at: float, outcome: str = "completed", **more: Any) -> dict[str, Any]:
    return event("job_finished", at, result={"outcome": outcome, **more})


def spans(timeline: Timeline, name: str) -> list[tuple[str, float, float | None]]:
    lane = next(lane for lane in timeline.lanes if lane.name == name)
    ends = [None if span.ended is None else round(span.ended - timeline.began, 6) for span in lane.spans]
    return [
        (span.label, round(span.began - timeline.began, 6), end) for span, end in zip(lane.spans, ends, strict=True)
    ]


def marks(timeline: Timeline, name: str) -> list[str]:
    return [mark.label for lane in timeline.lanes if lane.name == name for mark in lane.marks]


JOB = [
    event("job_started", 0, index="cidx", agent="claude"),
    event("state", 0.001, state="starting"),
    index(0.1, "FallbackReconcile", "it was stale"),
    started(0.11, "reconcile", 3),
    exited(0.21, "reconcile", 3),
    event("reconcile", 0.22, ok=True, seconds=0.12, reason=""),
    index(0.23, "Terminated"),
    index(0.231, "Starting"),
    started(0.24, "watch", 4),
    index(0.4, "Running"),
    event("heartbeat", 0.45, rss_bytes=1 << 20, processes=[{}], agent_silent_seconds=None),
    started(0.5),
    event("state", 0.501, state="running"),
    event("agent_tool_use", 0.6, name="Read", input={"file_path": "a.py"}),
    event("cancel", 0.7, reason="enough", step=1),
    event("state", 0.701, state="stopping"),
    event("signal_sent", 0.702, role="agent", signal="SIGTERM", count=3),
    exited(0.8, code=None, by="SIGTERM"),
    event("state", 0.81, state="settling"),
    index(0.82, "Stopping"),
    exited(0.9, "watch", 4),
    index(0.91, "Terminated"),
    event("index", 0.92, state="Terminated", cause="end", status="watch_terminated", reason="as it should"),
    event("state", 0.95, state="done"),
    finished(0.951, "cancelled", error="cancelled: enough", index={"status": "watch_terminated"}),
]


def test_a_whole_job_has_its_lanes_in_order() -> None:
    timeline = timeline_of(JOB)
    names = ["job", "index", "reconcile", "watch", "agent", "heartbeat", "signals", "cancel"]
    assert [lane.name for lane in timeline.lanes] == names
    assert (timeline.job_id, timeline.outcome) == ("j1", "cancelled")
    assert timeline.ended is not None
    assert timeline.ended - timeline.began == pytest.approx(0.951, abs=1e-6)
    assert timeline.detail == "cancelled: enough; index watch_terminated"
    assert spans(timeline, "job") == [
        ("starting", 0.001, 0.501),
        ("running", 0.501, 0.701),
        ("stopping", 0.701, 0.81),
        ("settling", 0.81, 0.95),
    ]
    assert spans(timeline, "index") == [
        ("FallbackReconcile", 0.1, 0.23),
        ("Terminated", 0.23, 0.231),
        ("Starting", 0.231, 0.4),
        ("Running", 0.4, 0.82),
        ("Stopping", 0.82, 0.91),
        ("Terminated", 0.91, 0.951),
    ]
    assert spans(timeline, "reconcile") == [("reconciled", 0.11, 0.21)]
    assert spans(timeline, "agent") == [("SIGTERM", 0.5, 0.8)]
    assert spans(timeline, "watch") == [("exit 0", 0.24, 0.9)]
    assert marks(timeline, "agent") == ["Read"]
    assert marks(timeline, "signals") == ["SIGTERM → agent ×3"]
    assert marks(timeline, "cancel") == ["cancel"]
    assert timeline.lanes[5].marks[0].detail == "1 process, 1.0 MiB"


def test_what_never_ended_stays_open() -> None:
    timeline = timeline_of(JOB[:14])
    assert timeline.ended is None
    assert timeline.outcome == ""
    assert spans(timeline, "agent") == [("runs", 0.5, None)]
    assert spans(timeline, "watch") == [("runs", 0.24, None)]
    assert spans(timeline, "job")[-1] == ("running", 0.501, None)
    assert spans(timeline, "index")[-1] == ("Running", 0.4, None)


def test_a_process_that_outlives_the_log_is_open_though_the_job_has_ended() -> None:
    timeline = timeline_of([event("state", 0, state="starting"), started(1, "watch"), finished(2)])
    assert spans(timeline, "watch") == [("runs", 1, None)]
    assert spans(timeline, "job") == [("starting", 0, 2)]


def test_the_end_of_a_process_that_began_before_the_log_is_told_as_such() -> None:
    timeline = timeline_of([event("state", 0, state="starting"), exited(1, "watch", code=1)])
    assert spans(timeline, "watch") == [("exit 1", 0, 1)]
    assert timeline.lanes[-1].spans[0].late


def test_a_reconcile_is_judged_by_its_event_and_not_by_its_exit_code() -> None:
    timeline = timeline_of(
        [started(1, "reconcile"), exited(2, "reconcile"), event("reconcile", 2.1, ok=False, reason="ERROR")]
    )
    span = timeline.lanes[0].spans[0]
    assert (span.label, span.mood, span.detail) == ("not to be believed", "bad", "ERROR; exit 0; prog (pid 7)")


def test_a_reconcile_without_a_process_is_drawn_for_as_long_as_it_took() -> None:
    timeline = timeline_of(
        [event("state", 0, state="starting"), event("reconcile", 5, ok=False, seconds=2.0, reason="no program")]
    )
    assert spans(timeline, "reconcile") == [("not to be believed", 3, 5)]


def test_an_agent_in_our_process_has_a_span_while_the_job_runs() -> None:
    timeline = timeline_of(
        [event("state", 0, state="running"), event("agent_text", 1, text="hm"), event("state", 2, state="settling")]
    )
    assert spans(timeline, "agent") == [("in our process", 0, 2)]
    assert marks(timeline, "agent") == ["text"]


def test_events_that_were_left_out_are_told() -> None:
    timeline = timeline_of([event("events_dropped", 1, count=3), event("events_dropped", 2, count=4)])
    assert timeline.left_out == 7
    assert "7 events are not in its log" in svg(timeline)


def test_a_clock_that_was_set_back_makes_no_negative_length() -> None:
    timeline = timeline_of([started(5), exited(3), event("state", 4, state="running")])
    assert spans(timeline, "agent") == [("exit 0", 2, 2)]
    assert timeline.seconds == 2
    ElementTree.fromstring(svg(timeline).encode())


def test_lines_that_are_no_events_are_passed_over() -> None:
    strange: list[Any] = [None, 1, "x", [], {}, {"type": "state"}, {"type": "state", "time": "yesterday"}]
    strange += [{"type": ["state"], "time": rfc3339(BEGAN)}, {"type": "tomorrow's", "time": rfc3339(BEGAN)}]
    strange += [{"type": "state", "time": "2026-11-21T12:00:00"}, {"type": "state", "time": "0001-01-01T00:00:00Z"}]
    assert timeline_of(strange) == Timeline()


def test_a_log_has_no_end_of_roles_but_a_picture_has() -> None:
    timeline = timeline_of([started(number, role=f"role{number}") for number in range(1000)])
    assert len(timeline.lanes) == MOST_LANES + 1
    assert len(timeline.lanes[-1].spans) == 1000 - MOST_LANES


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that are soon reached."""
    monkeypatch.setattr(timeline_module, "MOST_MARKS", MOST_MARKS)
    monkeypatch.setattr(timeline_module, "MOST_KEPT_SPANS", MOST_KEPT_SPANS)


MOST_MARKS, MOST_KEPT_SPANS = 100, 200


@pytest.mark.usefixtures("small")
def test_of_a_log_without_end_a_bounded_part_is_kept_and_the_rest_is_told() -> None:
    def log() -> Iterator[dict[str, Any]]:
        yield event("state", 0, state="running")
        yield event("cancel", 1, reason="early", step=1)
        for number in range(3 * MOST_MARKS):
            yield event("heartbeat", number)
        for number in range(MOST_KEPT_SPANS):
            yield started(number, pid=number)
            yield exited(number, pid=number)
        yield exited(9, role="watch", pid=8)
        yield event("reconcile", 9, ok=True, seconds=1, reason="")
        yield event("state", 3 * MOST_MARKS, state="settling")
        yield event("cancel", 3 * MOST_MARKS, reason="late", step=2)

    timeline = timeline_of(log())
    beats = next(lane.marks for lane in timeline.lanes if lane.name == "heartbeat")
    kept_spans = sum(len(lane.spans) for lane in timeline.lanes)
    assert kept_spans == MOST_KEPT_SPANS
    assert len(beats) <= MOST_MARKS
    assert beats[-1].at - BEGAN > 3 * MOST_MARKS - 10  # evenly, up to the end
    assert timeline.not_kept == 3 * MOST_MARKS - len(beats) + 7
    assert marks(timeline, "cancel") == ["cancel", "cancel (step 2)"]
    assert f"{timeline.not_kept} marks and spans are not drawn" in svg(timeline)
    assert to_json(timeline)["not_kept"] == timeline.not_kept


@pytest.mark.usefixtures("small")
def test_errors_without_end_are_bounded_too() -> None:
    bad = [{**event("index_output", number), "kind": "error"} for number in range(2 * MOST_MARKS)]
    timeline = timeline_of(bad)
    assert len(timeline.lanes[0].marks) <= MOST_MARKS
    assert timeline.not_kept + len(timeline.lanes[0].marks) == 2 * MOST_MARKS


def test_a_strangers_text_is_one_printable_line() -> None:
    beat = event("heartbeat", 0, rss_bytes=1e300, agent_silent_seconds=1e300)
    timeline = timeline_of(
        [event("cancel", 0, reason=HOSTILE, step=1), started(0, role=HOSTILE), index(0, HOSTILE), beat]
    )
    for lane in timeline.lanes:
        for text in (lane.name, *(part for item in (*lane.spans, *lane.marks) for part in (item.label, item.detail))):
            assert text.isprintable()
            assert len(text) <= 300


def test_as_json_times_are_told_to_the_microsecond() -> None:
    told = to_json(timeline_of(JOB))
    assert told["type"] == "timeline"
    assert (told["began"], told["seconds"]) == (rfc3339(BEGAN), 0.951)
    agent = next(lane for lane in told["lanes"] if lane["name"] == "agent")
    assert agent["spans"][0]["start"] == 0.5
    assert agent["spans"][0]["seconds"] == 0.3
    assert agent["spans"][0]["open"] is False
    assert agent["marks"][0]["start"] == 0.6


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.just(HOSTILE)
    | st.just("[/x]")
    | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
FIELDS = ("role", "pid", "exit_code", "signal", "count", "state", "reason", "step", "result", "ok", "seconds", "kind")
FIELDS += ("line", "rss_bytes", "processes", "agent_silent_seconds", "survivors", "stream", "name", "input", "is_error")
KINDS = sorted({each["type"] for each in JOB} | {"tree_empty", "output_truncated", "index_output", "events_dropped"})
KINDS += ["agent_init", "agent_text", "agent_result", "agent_tool_result", "agent_retry"]
TIMES = st.floats(-10, 1e6).map(lambda at: rfc3339(BEGAN + at)) | st.sampled_from(["", "9999-12-31T23:59:59Z", "x"])
EVENTS = st.fixed_dictionaries(
    {"type": st.sampled_from(KINDS) | VALUES, "time": TIMES | VALUES}, optional=dict.fromkeys(FIELDS, VALUES)
)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(EVENTS | VALUES, max_size=6))
@example([started(0, role="[/x]"), event("signal_sent", 0, role="[/x]", signal="[/x]", count=1)])
def test_whatever_is_in_a_log_it_is_drawn(events: list[Any]) -> None:
    timeline = timeline_of(events)
    assert timeline.last >= timeline.began
    for lane in timeline.lanes:
        for span in lane.spans:
            assert timeline.began <= span.began <= timeline.end_of(span)
    to_line(to_json(timeline))
    ElementTree.fromstring(svg(timeline).encode())
    if timeline.lanes:
        drawn = _drawn(timeline).decode(Console().encoding)
        assert all(letter.isprintable() or letter == "\n" for letter in drawn)


# --- the picture -------------------------------------------------------------------------------------------


def texts(picture: str) -> list[tuple[float, float, str]]:
    """Where the texts are: left, baseline, and what."""
    name = "{http://www.w3.org/2000/svg}text"
    found = ElementTree.fromstring(picture.encode()).iter(name)
    return [
        (float(each.attrib["x"]), float(each.attrib["y"]), (each.text or "") or each[-1].tail or "") for each in found
    ]


def test_the_picture_tells_spans_and_marks_to_the_millisecond() -> None:
    picture = svg(timeline_of(JOB))
    assert "SIGTERM: 0.500 s to 0.800 s (0.300 s)" in picture
    assert "0.702 s SIGTERM → agent ×3" in picture
    assert "<script" not in picture
    assert "http://" not in picture.replace('xmlns="http://www.w3.org/2000/svg"', "")


def test_the_picture_of_hostile_texts_is_sound_xml() -> None:
    lane = Lane(
        name=HOSTILE,
        spans=(Span(label=HOSTILE, began=BEGAN, ended=BEGAN + 9, detail=HOSTILE),),
        marks=(Mark(label=HOSTILE, at=BEGAN + 1, detail=HOSTILE),),
    )
    timeline = Timeline(
        job_id=HOSTILE, began=BEGAN, last=BEGAN + 10, outcome=HOSTILE, detail=HOSTILE, lanes=(lane, lane)
    )
    root = ElementTree.fromstring(svg(timeline).encode())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))


def test_very_many_marks_and_spans_make_no_large_picture() -> None:
    beats = tuple(Mark(label="heartbeat", at=BEGAN + number) for number in range(30_000))
    many = tuple(Span(label="exit 0", began=BEGAN + number, ended=BEGAN + number + 1) for number in range(10_000))
    lanes = (Lane(name="heartbeat", marks=beats), Lane(name="agent", spans=many, marks=beats))
    picture = svg(Timeline(began=BEGAN, last=BEGAN + 30_000, lanes=lanes))
    assert len(picture) < 1 << 20
    assert picture.count('class="span"') == MOST_SPANS
    assert f"the {MOST_SPANS} longest of 10000 spans" in picture
    assert picture.count("<circle") < 2 * WIDTH / 6
    assert re.search(r"and \d+ more until", picture)


def test_no_two_labels_of_marks_overlap() -> None:
    signals = tuple(Mark(label=f"SIGTERM → agent ×{number}", at=BEGAN + number * 0.7) for number in range(60))
    said = tuple(Mark(label="Write", at=BEGAN + number * 0.4) for number in range(100))
    lanes = (Lane(name="signals", marks=signals), Lane(name="agent", marks=said))
    found = texts(svg(Timeline(began=BEGAN, last=BEGAN + 43, lanes=lanes)))
    labels = sorted((y, x, text) for x, y, text in found if "→" in text or "Write" in text)
    assert len(labels) > 10
    for (y, x, text), (below, following, _) in pairwise(labels):
        assert y != below or x + len(text) * 6 <= following, (text, x, following)
        assert x + len(text) * 6 <= WIDTH


def test_an_open_end_is_drawn_torn() -> None:
    picture = svg(timeline_of(JOB[:14]))
    assert picture.count('class="torn"') == 4  # job, index, watch, agent
    assert "its end is not in the log" in picture
    assert 'class="torn"' not in svg(timeline_of(JOB))


def test_processes_of_one_role_that_overlap_are_drawn_below_each_other() -> None:
    both = timeline_of(
        [started(0, pid=1), started(1, pid=2), exited(2, pid=1), exited(3, pid=2), started(4, pid=3), exited(5, pid=3)]
    )
    tops = [float(y) for y in re.findall(r'<rect class="span [^>]* y="([\d.]+)"', svg(both))]
    assert len(tops) == 3
    assert tops[0] != tops[2] or tops[0] != tops[1]
    assert len(set(tops)) == 2


@pytest.mark.parametrize("seconds", [0.0, 0.0004, 0.01, 1.0, 3.9, 59, 61, 3700, 86400, 1e6, 1e9])
def test_ticks_are_round_and_few(seconds: float) -> None:
    found = ticks(seconds, 12)
    assert 1 <= len(found) <= 13
    assert found[0] == 0
    assert all(tick <= seconds + 1e-6 for tick in found)
    labels = [tick_label(tick) for tick in found]
    assert len(set(labels)) == len(labels)
    assert all(len(label) <= 14 for label in labels)


def test_moments_are_told_to_the_millisecond() -> None:
    assert [clock(each) for each in (0, 1.25, 59.9996, 123.456, 3723.4567, -0.5)] == [
        "0.000 s",
        "1.250 s",
        "1:00.000",
        "2:03.456",
        "1:02:03.457",
        "-0.500 s",
    ]
