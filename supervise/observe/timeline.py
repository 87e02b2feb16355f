"""The life of a job, from its event log: lanes of spans and marks. No I/O, no clock.

    job          its states
    index        the states of the watch
    reconcile    each reconcile, and whether it is to be believed
    (a role)     each process of the agent, the watch, …; the agent's lane also has what it said
    heartbeat, signals, cancel    marks

A log is what a crash has left of it: what is not understood is passed over, and a span without an end stays open.
A log may have any size, a timeline has not: of very many marks in a lane some are kept, evenly; of spans, the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Final, final

from attrs import evolve, field, frozen

from supervise.codec import rfc3339

__all__ = ["Lane", "Mark", "Span", "Timeline", "clock", "timeline_of", "to_json"]

#: Lanes at most; further roles share one.
MOST_LANES: Final = 24
OTHERS: Final = "others"

#: Marks that one lane keeps, and spans that all lanes keep together. A log of `events_max_bytes` has fewer spans.
MOST_MARKS: Final = 10_000
MOST_KEPT_SPANS: Final = 20_000

#: Characters of a text that are kept.
TEXT_LIMIT: Final = 300

#: Times outside of these years are no times of a job. Seconds since the epoch.
EARLIEST, LATEST = 0.0, 32503680000.0

GOOD, BAD, WARN, PLAIN = "good", "bad", "warn", ""


@frozen(kw_only=True)
class Span:
    """Something that took time.

    Attributes:
        label: what it was, in a word or two.
        began: seconds since the epoch.
        ended: likewise; `None`: its end is not in the log.
        detail: one line more, perhaps.
        mood: `good`, `bad`, `warn` or empty.
        late: it began before the log did.
    """

    label: str
    began: float
    ended: float | None = None
    detail: str = ""
    mood: str = PLAIN
    late: bool = False


@frozen(kw_only=True)
class Mark:
    """Something that happened at one moment. Attributes as of a `Span`."""

    label: str
    at: float
    detail: str = ""
    mood: str = PLAIN


@frozen(kw_only=True)
class Lane:
    """What belongs together, in the order of time."""

    name: str
    spans: tuple[Span, ...] = ()
    marks: tuple[Mark, ...] = ()


@frozen(kw_only=True)
class Timeline:
    """A job's life.

    Attributes:
        job_id: empty if no event says it.
        began, last: the first and the last moment that the log knows, in seconds since the epoch.
        ended: when the job ended; `None`: its end is not in the log (it runs, or its supervisor was killed).
        outcome: how; empty without an end.
        detail: the failure, and what became of the index.
        left_out: events that the log does not hold, for its size.
        not_kept: marks and spans that are in the log, but not here.
        lanes: in the order to be drawn.
    """

    job_id: str = ""
    began: float = 0.0
    last: float = 0.0
    ended: float | None = None
    outcome: str = ""
    detail: str = ""
    left_out: int = 0
    not_kept: int = 0
    lanes: tuple[Lane, ...] = field(default=())

    @property
    def seconds(self) -> float:
        """From the beginning to the end, or as far as is known."""
        return self.last - self.began

    def end_of(self, span: Span) -> float:
        """Where the span ends; an open one is drawn to the end of the log."""
        return self.last if span.ended is None else span.ended

    def rows_of(self, spans: Iterable[Span], most: int) -> list[list[Span]]:
        """Spans, in the order of their beginnings, in rows: those that overlap below each other.

        There are at most `most` rows; what has no room in them is put into the last one all the same.
        """
        rows: list[list[Span]] = []
        ends: list[float] = []
        for span in spans:
            free = next((number for number, end in enumerate(ends) if end <= span.began), None)
            if free is None and len(rows) < most:
                rows.append([])
                ends.append(span.began)
            number = len(rows) - 1 if free is None else free
            rows[number].append(span)
            ends[number] = max(ends[number], self.end_of(span))
        return rows


def timeline_of(events: Iterable[object]) -> Timeline:
    """The timeline of what an event log holds.

    Args:
        events: its lines as JSON data. What is no event is passed over.
    """
    reader = _Reader()
    for event in events:
        reader.take(event)
    return reader.timeline()


def to_json(timeline: Timeline) -> dict[str, Any]:
    """The timeline as one JSON object: times as RFC 3339, and as seconds since its beginning."""

    def span(each: Span) -> dict[str, Any]:
        return {
            "label": each.label,
            "detail": each.detail,
            "mood": each.mood,
            "began": rfc3339(each.began),
            "ended": None if each.ended is None else rfc3339(each.ended),
            "start": _round(each.began - timeline.began),
            "seconds": _round(timeline.end_of(each) - each.began),
            "open": each.ended is None,
            "late": each.late,
        }

    def mark(each: Mark) -> dict[str, Any]:
        moment = {"time": rfc3339(each.at), "start": _round(each.at - timeline.began)}
        return {"label": each.label, "detail": each.detail, "mood": each.mood, **moment}

    return {
        "type": "timeline",
        "job_id": timeline.job_id,
        "began": rfc3339(timeline.began),
        "ended": None if timeline.ended is None else rfc3339(timeline.ended),
        "last_event": rfc3339(timeline.last),
        "seconds": _round(timeline.seconds),
        "outcome": timeline.outcome or None,
        "detail": timeline.detail,
        "left_out": timeline.left_out,
        "not_kept": timeline.not_kept,
        "lanes": [
            {"name": lane.name, "spans": list(map(span, lane.spans)), "marks": list(map(mark, lane.marks))}
            for lane in timeline.lanes
        ],
    }


def clock(seconds: float) -> str:
    """A length or a moment to the millisecond: `1.250 s`, `2:03.456`, `1:02:03.456`."""
    thousandths = round(seconds * 1000)
    whole, rest = divmod(abs(thousandths), 1000)
    sign = "-" if thousandths < 0 else ""
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{sign}{hours}:{minutes:02}:{whole:02}.{rest:03}"
    if minutes:
        return f"{sign}{minutes}:{whole:02}.{rest:03}"
    return f"{sign}{whole}.{rest:03} s"


# --- reading -----------------------------------------------------------------------------------------------


@final
class _Lane:
    """A lane that is being filled."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.spans: list[Span] = []
        self.marks: list[Mark] = []
        self.open: dict[object, int] = {}  # by whatever tells them apart: where in `spans`
        self.plain = 0  # marks of no mood that came
        self.one_in = 1  # of so many of those, one is kept

    def end(self, key: object, at: float, **changes: Any) -> bool:
        """Returns whether there was such a span."""
        number = self.open.pop(key, None)
        if number is None:
            return False
        span = self.spans[number]
        self.spans[number] = evolve(span, ended=max(at, span.began), **changes)
        return True


#: Lanes before and behind those of the processes.
_FIRST: Final[list[str]] = ["job", "index", "reconcile"]
_LAST: Final[list[str]] = ["heartbeat", "signals", "cancel"]

#: The key of the one span that is open in a lane of states.
_STATE: Final = "state"

_INDEX_MOOD: Final = {
    "Running": GOOD,
    "Failed": BAD,
    "FallbackReconcile": WARN,
    "Starting": WARN,
    "Stopping": WARN,
    "Terminated": PLAIN,
    "NotStarted": PLAIN,
}
_JOB_MOOD: Final = {"running": GOOD, "stopping": BAD, "starting": WARN, "settling": WARN}


@final
class _Reader:
    """Takes events, one by one, as they come out of a file."""

    def __init__(self) -> None:
        self.job_id = ""
        self.first: float | None = None
        self.last = 0.0
        self.ended: float | None = None
        self.outcome = ""
        self.detail = ""
        self.left_out = 0
        self.not_kept = 0
        self.spans = 0  # in all lanes
        self.lanes: dict[str, _Lane] = {}
        self.agent_in_process = True
        self.reconciled = 0  # spans of reconciles that were judged

    def take(self, event: object) -> None:
        """The next one."""
        if not isinstance(event, Mapping):
            return
        kind, at = event.get("type"), _moment(event.get("time"))
        take = _TAKE.get(kind) if isinstance(kind, str) else None
        if at is None or not isinstance(kind, str):
            return
        if take is None and not kind.startswith("agent_"):
            return
        self.first = at if self.first is None else min(self.first, at)
        self.last = max(self.last, at)
        self.job_id = self.job_id or _text(event.get("job_id"))
        if take is not None:
            take(self, event, at)

    def timeline(self) -> Timeline:
        """What was taken."""
        began = self.first or 0.0
        names = [name for name in _FIRST if name in self.lanes]
        names += [name for name in self.lanes if name not in _FIRST and name not in _LAST]
        names += [name for name in _LAST if name in self.lanes]
        lanes = []
        for name in names:
            lane = self.lanes[name]
            spans = [evolve(each, began=began) if each.late else each for each in lane.spans]
            spans.sort(key=lambda each: each.began)
            marks = sorted(lane.marks, key=lambda each: each.at)
            lanes.append(Lane(name=name, spans=tuple(spans), marks=tuple(marks)))
        return Timeline(
            job_id=self.job_id,
            began=began,
            last=self.last,
            ended=self.ended,
            outcome=self.outcome,
            detail=self.detail,
            left_out=self.left_out,
            not_kept=self.not_kept,
            lanes=tuple(lanes),
        )

    def lane(self, name: str) -> _Lane:
        """By its name. A stranger's log has no end of names."""
        if name not in self.lanes and len(self.lanes) >= MOST_LANES and name not in (*_FIRST, *_LAST, "agent"):
            name = OTHERS
        return self.lanes.setdefault(name, _Lane(name))

    def mark(self, lane: str, at: float, label: str, detail: str = "", mood: str = PLAIN) -> None:
        """One moment."""
        place = self.lane(lane)
        place.plain += mood == PLAIN
        if mood == PLAIN and place.plain % place.one_in:
            self.not_kept += 1
            return
        place.marks.append(Mark(label=label, at=at, detail=detail, mood=mood))
        if len(place.marks) > MOST_MARKS:
            self.not_kept += len(place.marks) // 2
            place.marks = place.marks[::2]
            place.one_in *= 2

    def begin(self, lane: str, key: object, span: Span) -> None:
        """A span, whose end is known by `key`."""
        if self.add(lane, span):
            place = self.lane(lane)
            place.open[key] = len(place.spans) - 1

    def add(self, lane: str, span: Span) -> bool:
        """A span; returns whether there was room for it."""
        place = self.lane(lane)
        if self.spans >= MOST_KEPT_SPANS:
            self.not_kept += 1
            return False
        self.spans += 1
        place.spans.append(span)
        return True

    def enter(self, name: str, state: str, at: float, detail: str, mood: str) -> None:
        """A lane of states goes on to another one, or learns more of the one that it is in."""
        lane = self.lane(name)
        number = lane.open.get(_STATE)
        if number is not None and lane.spans[number].label == state:
            known = lane.spans[number]
            if detail and detail not in known.detail:
                both = f"{known.detail}; {detail}" if known.detail else detail
                lane.spans[number] = evolve(known, detail=both[:TEXT_LIMIT])
            return
        lane.end(_STATE, at)
        self.begin(name, _STATE, Span(label=state, began=at, detail=detail, mood=mood))


_Take = Callable[[_Reader, Mapping[str, Any], float], None]
"""What an event of one kind, of a moment, does to the timeline."""


def _job_started(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    reader.lane("job")
    if _text(event.get("index")) not in ("", "none"):
        reader.lane("index")


def _state(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    state = _text(event.get("state"))
    if state == "done":
        reader.lane("job").end(_STATE, at)
        return
    reader.enter("job", state, at, "", _JOB_MOOD.get(state, PLAIN))
    agent = reader.lanes.get("agent")
    if state == "running" and reader.agent_in_process:
        reader.begin("agent", _STATE, Span(label="in our process", began=at, mood=GOOD))
    elif agent is not None and state == "settling":
        agent.end(_STATE, at)


def _cancel(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    step = _number(event.get("step"))
    label = "cancel" if step in (None, 1) else f"cancel (step {step:g})"
    reader.mark("cancel", at, label, _text(event.get("reason")), WARN)


def _job_finished(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    result = event.get("result")
    result = result if isinstance(result, Mapping) else {}
    index = result.get("index")
    status = _text(index.get("status")) if isinstance(index, Mapping) else ""
    parts = (_text(result.get("failure_kind")), _text(result.get("error")), f"index {status}" if status else "")
    reader.outcome = _text(result.get("outcome")) or "ended"
    reader.detail = "; ".join(part for part in parts if part)[:TEXT_LIMIT]
    reader.ended = at
    for name in ("job", "index"):  # states of rest last to the end
        if name in reader.lanes:
            reader.lanes[name].end(_STATE, at)
    if "agent" in reader.lanes:
        reader.lanes["agent"].end(_STATE, at)


def _dropped(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    count = _number(event.get("count"))
    if count is None or not 0 < count < 1e15:
        return
    reader.left_out += int(count)
    reader.mark("job", at, f"{int(count)} events left out", "the log holds no more of them", WARN)


def _process_started(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    role = _text(event.get("role")) or "?"
    pid = _pid(event)
    if role == "agent":
        reader.agent_in_process = False
    reader.begin(role, ("pid", pid), Span(label="runs", began=at, detail=_program(event, pid)))


def _process_exited(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    role = _text(event.get("role")) or "?"
    pid = _pid(event)
    code, by = _number(event.get("exit_code")), _text(event.get("signal"))
    label = by or (f"exit {code:g}" if code is not None else "ended")
    mood = GOOD if code == 0 and not by else BAD
    if not reader.lane(role).end(("pid", pid), at, label=label, mood=mood):
        # A shared watch that was there before this job.
        reader.add(role, Span(label=label, began=at, ended=at, detail=f"pid {pid}", mood=mood, late=True))


def _reconciled(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    lane = reader.lane("reconcile")
    ok, seconds = event.get("ok") is True, _number(event.get("seconds"))
    label, mood = ("reconciled", GOOD) if ok else ("not to be believed", BAD)
    reason = _text(event.get("reason"))
    if len(lane.spans) == reader.reconciled:  # no process of it was started
        began = min(at, max(EARLIEST, at - (seconds or 0.0)))
        reader.add("reconcile", Span(label=label, began=began, ended=at, detail=reason, mood=mood))
    else:
        span = lane.spans[-1]
        detail = "; ".join(part for part in (reason, span.label, span.detail) if part)
        lane.spans[-1] = evolve(span, label=label, detail=detail[:TEXT_LIMIT], mood=mood)
    reader.reconciled = len(lane.spans)


def _signal(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    name, role = _text(event.get("signal")) or "a signal", _text(event.get("role")) or "?"
    count = _number(event.get("count"))
    many = "" if count in (None, 1) else f" ×{count:g}"
    reader.mark("signals", at, f"{name} → {role}{many}", "", BAD if name == "SIGKILL" else WARN)


def _tree_empty(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    survivors = _number(event.get("survivors"))
    if survivors:
        reader.mark(_text(event.get("role")) or "?", at, f"{survivors:g} could not be ended", "", BAD)


def _truncated(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    what = f"{_text(event.get('stream'))}: {_text(event.get('reason'))}"
    reader.mark(_text(event.get("role")) or "?", at, "output was dropped", what, WARN)


def _heartbeat(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    parts = []
    processes, rss = event.get("processes"), _number(event.get("rss_bytes"))
    if isinstance(processes, list):
        parts.append(f"{len(processes)} {'process' if len(processes) == 1 else 'processes'}")
    if rss is not None:
        parts.append(f"{rss / 2**20:.1f} MiB")
    silent = _number(event.get("agent_silent_seconds"))
    if silent is not None:
        parts.append(f"agent silent for {clock(silent)}")
    reader.mark("heartbeat", at, "heartbeat", ", ".join(parts))


def _index(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    state = _text(event.get("state")) or "?"
    reason = _text(event.get("reason"))
    reader.enter("index", state, at, reason, _INDEX_MOOD.get(state, PLAIN))


def _index_output(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    bad = event.get("kind") == "error"
    reader.mark("index", at, "error" if bad else "ready", _text(event.get("line")), BAD if bad else GOOD)


def _said(label: str, detail: str = "", mood: str = PLAIN) -> _Take:
    """What makes a mark of an event of the agent; `detail` is the field that tells more."""

    def take(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
        reader.mark("agent", at, label, _text(event.get(detail)) if detail else "", mood)

    return take


def _tool_use(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    given = event.get("input")
    detail = ""
    if isinstance(given, Mapping):
        names = ("command", "file_path", "path", "pattern", "url", "description")
        detail = next((_text(given[name]) for name in names if isinstance(given.get(name), str)), "")
    reader.mark("agent", at, _text(event.get("name")) or "a tool", detail)


def _tool_result(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    if event.get("is_error") is True:
        reader.mark("agent", at, "tool failed", _text(event.get("text")), BAD)


def _agent_result(reader: _Reader, event: Mapping[str, Any], at: float) -> None:
    bad = event.get("is_error") is True
    turns = _number(event.get("num_turns"))
    label = "error" if bad else "result"
    told = "" if turns is None else f"{turns:g} turns: "
    reader.mark("agent", at, label, told + _text(event.get("text")), BAD if bad else GOOD)


_TAKE: Final[dict[str, _Take]] = {
    "job_started": _job_started,
    "state": _state,
    "cancel": _cancel,
    "job_finished": _job_finished,
    "events_dropped": _dropped,
    "process_started": _process_started,
    "process_exited": _process_exited,
    "signal_sent": _signal,
    "tree_empty": _tree_empty,
    "output_truncated": _truncated,
    "heartbeat": _heartbeat,
    "index": _index,
    "index_output": _index_output,
    "reconcile": _reconciled,
    "agent_init": _said("turn begins", "model"),
    "agent_text": _said("text", "text"),
    "agent_output": _said("output", "line"),
    "agent_retry": _said("API retry", "error", WARN),
    "agent_permission_denied": _said("denied", "tool", WARN),
    "agent_bad_line": _said("bad line", "reason", WARN),
    "agent_tool_use": _tool_use,
    "agent_tool_result": _tool_result,
    "agent_result": _agent_result,
}


def _moment(value: object) -> float | None:
    """Seconds since the epoch, of RFC 3339."""
    if not isinstance(value, str) or len(value) > 64:
        return None
    try:
        moment = datetime.fromisoformat(value)
        at = moment.timestamp() if moment.tzinfo is not None else math.nan
    except (ValueError, OverflowError):
        return None
    return at if EARLIEST <= at <= LATEST else None


def _number(value: object) -> float | None:
    """One that can be reckoned with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and abs(number) < 1e15 else None


def _pid(event: Mapping[str, Any]) -> str:
    pid = _number(event.get("pid"))
    return "?" if pid is None else f"{pid:.0f}"


def _program(event: Mapping[str, Any], pid: str) -> str:
    return " ".join(part for part in (_text(event.get("program")), f"(pid {pid})") if part)


def _text(value: object) -> str:
    """One printable line of it: neither a terminal nor a picture gets a stranger's control characters."""
    if not isinstance(value, str):
        return ""
    value = value[: 4 * TEXT_LIMIT]
    if value.isprintable() and "  " not in value and value[:1] != " " and value[-1:] != " ":  # for most
        return value if len(value) <= TEXT_LIMIT else value[: TEXT_LIMIT - 1] + "…"
    shown = "".join(letter if letter.isprintable() else " " for letter in value)
    flat = " ".join(shown.split())
    return flat if len(flat) <= TEXT_LIMIT else flat[: TEXT_LIMIT - 1] + "…"


def _round(seconds: float) -> float:
    return round(seconds, 6)
