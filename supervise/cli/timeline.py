"""`supervise timeline`: the life of a job as a picture, in the terminal or as SVG."""

from __future__ import annotations

import difflib
import errno
import json as json_module
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, Final, TypeVar, TypeVarTuple

import trio
from attrs import evolve, frozen
from rich.console import Console
from rich.table import Table
from rich.text import Text

from supervise import durable
from supervise.cli import exit_codes
from supervise.cli.stdout import Stdout
from supervise.cli.streams import SPELL, on_terminal
from supervise.cli.view import COLOURS, say, tell
from supervise.codec import loads, rfc3339, to_line
from supervise.dispatch.submit import job_id_of, workers_of
from supervise.errors import BadInput, SettingsError, SuperviseError
from supervise.job.directory import RESULT, lives
from supervise.job.event_log import EVENTS
from supervise.job.heartbeat import HEARTBEAT
from supervise.model import JOB_ID
from supervise.observe.timeline import Lane, Span, Timeline, clock, timeline_of, to_json
from supervise.observe.timeline_svg import svg as svg_of
from supervise.observe.timeline_svg import tick_label, ticks
from supervise.settings import Settings

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STDOUT: Final = 1

#: Of the chart where no terminal says it, and of the table below it. Characters.
CHART: Final = 100
WIDE: Final = 400
#: Of a terminal in which the table has all of its columns.
ROOMY: Final = 72

#: Rows of the table; of a lane, rows for spans at one time.
MOST_LINES: Final = 200
MOST_ROWS: Final = 4

#: A longer line is none of an event log. Bytes.
LINE: Final = 4 * 1024 * 1024
#: A longer result is none, either. Bytes.
LONGEST_RESULT: Final = 64 * 1024 * 1024
#: Job ids among which nearly right ones are looked for, the newest ones.
NEAR: Final = 2000


async def run(settings: Settings, job: str, svg: Path | None, json: bool, *, console: Console) -> int:
    """Draw the life of a job; the exit code.

    Args:
        settings: name the state directory, and perhaps a root.
        job: its id; or, where there is a root, the id of a task, of which the latest attempt is drawn.
        svg: a file to write the picture to, replaced whole; `-` is standard output. Nothing is drawn in the terminal.
        json: one JSON object on standard output in place of a drawing.
        console: where people look.

    Raises:
        SettingsError: both `json` and the picture are to be on standard output.
        SuperviseError: there is no such job, it has no event log, or the disk refuses.
    """
    if json and svg is not None and str(svg) == "-":
        raise SettingsError("--json and --svg - both want standard output; give --svg a file")
    jobs = settings.state_dir / "jobs"
    try:
        directory = await _reading(_directory_of, settings, jobs, job)
        timeline = await _reading(_read, directory)
    except OSError as error:
        raise SuperviseError(f"the event log cannot be read: {error.filename or jobs}: {error.strerror}") from None
    if directory.name != job:
        say(console, f"supervise: the latest attempt at task {job} is job {directory.name}", "dim")
    if not timeline.lanes:
        raise SuperviseError(f"the event log of job {directory.name} holds no event yet: {directory / EVENTS}")
    code = exit_codes.COMPLETED
    if svg is not None:
        code = await _save(timeline, svg, console)
    if json:
        code = await _put_out(to_line(to_json(timeline)))
    elif svg is None:
        code = await _put_out(_drawn(timeline))
    if timeline.ended is None and code == exit_codes.COMPLETED:
        tell(console, f"supervise: {await _reading(_why_no_end, directory)}", "yellow")
    return code


def _read(directory: Path) -> Timeline:
    """Of a job that lives, up to now: it need not have done anything of late."""
    living = lives(directory)
    timeline = timeline_of(_events(directory / EVENTS))
    if living and timeline.lanes and timeline.ended is None:
        return evolve(timeline, last=max(timeline.last, time.time()))
    return timeline


async def _reading(read: Callable[[*Ts], T], *args: *Ts) -> T:
    """`read(*args)` in a thread. Cancelling waits for nothing: a thread that only reads may be left alone."""
    return await trio.to_thread.run_sync(read, *args, abandon_on_cancel=True)


async def _save(timeline: Timeline, svg: Path, console: Console) -> int:
    data = svg_of(timeline).encode()
    if str(svg) == "-":
        return await _put_out(data)
    try:
        await trio.to_thread.run_sync(_replace, svg, data)
    except OSError as error:
        raise SuperviseError(f"the picture cannot be written to {svg}: {error.strerror}") from None
    say(console, f"supervise: the picture is in {svg}")
    return exit_codes.COMPLETED


def _replace(svg: Path, data: bytes) -> None:
    path = Path(os.path.realpath(svg))  # through a link, to the file that is meant
    if svg.exists() and not stat.S_ISREG(svg.stat().st_mode):  # replaced, a device would be none any more
        raise SuperviseError(f"the picture cannot be written to {svg}: it is no regular file; '-' is standard output")
    durable.replace(path, data, durable=False, mode=0o666)


async def _put_out(data: bytes) -> int:
    """On standard output; the exit code, which tells of a reader who has gone away."""
    stdout = Stdout(STDOUT, lambda: None)
    await stdout.text(data)
    if stdout.trouble:
        raise SuperviseError(f"standard output cannot be written to: {stdout.trouble}")
    return exit_codes.BROKEN_PIPE if stdout.closed else exit_codes.COMPLETED


# --- which job ---------------------------------------------------------------------------------------------


def _directory_of(settings: Settings, jobs: Path, job: str) -> Path:
    """The directory of the job that is meant; it has an event log."""
    directory = jobs / job if JOB_ID.fullmatch(job) else None
    if directory is None or not directory.is_dir():
        directory = _of_task(settings, jobs, job)
    if directory is None:
        raise SuperviseError(_unknown(settings, jobs, job))
    if not (directory / EVENTS).exists():
        why = "it has not begun, an earlier version ran it, or its disk was full"
        raise SuperviseError(f"job {directory.name} has no event log: {directory / EVENTS} is not there; {why}")
    return directory


def _of_task(settings: Settings, jobs: Path, task: str) -> Path | None:
    """Of the latest attempt at a task; `None` if there is no task of this id."""
    if settings.worker.root is None:
        return None
    root = Path(os.path.abspath(settings.worker.root))
    try:
        workers = workers_of(root, task)
    except BadInput:  # no task's id
        return None
    if not workers:
        return None
    found = []
    names = _names(jobs)
    for worker in workers:
        start = job_id_of(worker, task, 0, root)[:-1]
        found += [jobs / name for name in names if name.startswith(start) and name[len(start) :].isdigit()]
    if not found:
        why = "no attempt has begun, or its worker keeps its state elsewhere (state_dir)"
        raise SuperviseError(f"task {task} of worker {', '.join(workers)} has no job under {jobs}: {why}")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def _unknown(settings: Settings, jobs: Path, job: str) -> str:
    names = _names(jobs)
    # The newest: most ids begin with their time.
    newest = sorted(names, reverse=True)[:NEAR]
    near = [name for name in newest if job and job in name][:3] or difflib.get_close_matches(job, newest, 3, 0.5)
    if near:
        hint = f"do you mean {' or '.join(near)}?"
    elif names:
        hint = f"the latest one is {newest[0]}"
    else:
        hint = "there is no job at all; set state_dir (SUPERVISE_STATE_DIR) to where it ran"
    root = settings.worker.root
    tasks = f", and no task under {root}" if root is not None else "; for a task's id, give --root"
    return f"there is no job {job!r} under {jobs}{tasks}; {hint}"


def _names(jobs: Path) -> list[str]:
    try:
        return [name for name in os.listdir(jobs) if JOB_ID.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _events(path: Path) -> Iterator[object]:
    """What its lines hold. The last one may be torn; and a line too long is passed over."""
    with _opened(path) as file:
        while line := file.readline(LINE):
            if not line.endswith(b"\n") and len(line) == LINE:
                while (rest := file.readline(LINE)) and not rest.endswith(b"\n"):
                    pass
                continue
            try:
                yield loads(line)
            except (ValueError, RecursionError):
                continue


def _opened(path: Path) -> BinaryIO:
    """A file that a job has made: no link, and nothing that could keep its reader waiting. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.EINVAL, "it is a link; a job makes none", str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return open(descriptor, "rb")


def _why_no_end(directory: Path) -> str:
    """Of a job whose log has no end."""
    try:
        with _opened(directory / RESULT) as file:
            outcome = str(loads(file.read(LONGEST_RESULT))["outcome"])
        return f"the job has ended ({json_module.dumps(outcome)[1:-1]}), but its event log ends before"
    except FileNotFoundError:
        times = [_written(directory / name) for name in (EVENTS, HEARTBEAT)]
        signs = [each for each in times if each is not None]
        ago = f"; its last sign of life was {clock(max(0.0, time.time() - max(signs)))} ago" if signs else ""
        if lives(directory):
            return f"the job has not ended: it runs{ago}"
        return f"the job has not ended: its supervisor was killed{ago}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return f"the event log has no end, and what should tell how the job ended cannot be read: {directory / RESULT}"


def _written(path: Path) -> float | None:
    try:
        return path.lstat().st_mtime
    except OSError:
        return None


# --- the drawing -------------------------------------------------------------------------------------------


@frozen
class Letters:
    """What bars and marks are made of."""

    bars: str  # of neighbours in turn
    mark: str
    late: str
    open: str
    axis: str
    tick: str


UNICODE: Final = Letters("█▓", "●", "◀", "▶", "─", "┬")
ASCII: Final = Letters("#=", "*", "<", ">", "-", "+")

Cells = list[tuple[str, str]]
"""A letter and its style, each."""


def _drawn(timeline: Timeline) -> bytes:
    """Chart and table, for whatever standard output is."""
    out = Console()
    terminal = on_terminal(sys.stdout)
    letters = UNICODE if _can_draw(out.encoding) else ASCII
    chart = out if terminal else Console(width=CHART)
    table = out if terminal else Console(width=WIDE)
    with chart.capture() as first:
        chart.print(_head(timeline), soft_wrap=not terminal)
        for line in _chart(timeline, chart.width - (1 if terminal else 0), letters):
            chart.print(line, no_wrap=True, overflow="crop", crop=True)
        chart.print()
    with table.capture() as second:
        rows, more = _table(timeline, roomy=table.width >= ROOMY)
        table.print(rows)
        if more:
            table.print(Text(f"and {more} more; --json tells of all"))
    drawn = "".join(f"{line.rstrip()}\n" for line in (first.get() + second.get()).splitlines())
    return (drawn.replace("×", "x") if letters is ASCII else drawn).encode(out.encoding, SPELL)


def _can_draw(encoding: str) -> bool:
    try:
        "".join((UNICODE.bars, UNICODE.mark, UNICODE.late, UNICODE.open, UNICODE.axis, UNICODE.tick)).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _head(timeline: Timeline) -> Text:
    began = f"began {rfc3339(timeline.began)[:-4]}Z"
    if timeline.ended is None:
        how = f"no end in its log, so far {clock(timeline.seconds)}, {began}"
    else:
        how = f"{timeline.outcome} after {clock(timeline.seconds)}, {began}"
    text = Text.assemble((timeline.job_id or "a job", "bold"), f": {how}")
    if timeline.detail:
        text.append(f"\n{timeline.detail}")
    if timeline.left_out:
        text.append(f"\n{timeline.left_out} events are not in its log, for its size", "yellow")
    if timeline.not_kept:
        text.append(f"\n{timeline.not_kept} marks and spans of its log are too many to be drawn", "yellow")
    return text


def _chart(timeline: Timeline, width: int, letters: Letters) -> Iterator[Text]:
    """Lines of at most `width` columns."""
    names = min(max(len(lane.name) for lane in timeline.lanes), max(6, width // 5))
    columns = max(8, width - names - 1)
    seconds = max(timeline.seconds, 0.001)

    def at(moment: float) -> int:
        return min(columns - 1, max(0, int((moment - timeline.began) / seconds * columns)))

    marks = [(at(timeline.began + tick), tick_label(tick)) for tick in ticks(seconds, max(2, columns // 10))]
    labels, axis = [" "] * columns, [letters.axis] * columns
    free = 0
    for column, label in marks:
        axis[column] = letters.tick
        if column >= free and column + len(label) <= columns:
            labels[column : column + len(label)] = label
            free = column + len(label) + 1
    for line in (labels, axis):
        yield Text.assemble(" " * (names + 1), ("".join(line), "dim"))
    for lane in timeline.lanes:
        name = lane.name if len(lane.name) <= names else lane.name[: names - 1] + "~"
        lines = [_bars(row, timeline, columns, at, letters) for row in timeline.rows_of(lane.spans, MOST_ROWS)]
        if lane.marks or not lines:
            lines.append(_marks(lane, columns, at, letters))
        for number, cells in enumerate(lines):
            text = Text.assemble((f"{name if number == 0 else '':<{names}} ", "bold"))
            for style, run in groupby(cells, key=lambda cell: cell[1]):
                text.append("".join(letter for letter, _ in run), style or None)
            text.rstrip()
            yield text


def _bars(spans: list[Span], timeline: Timeline, columns: int, at: Callable[[float], int], letters: Letters) -> Cells:
    cells: Cells = [(" ", "")] * columns
    for number, span in enumerate(spans):
        start, end = at(span.began), at(timeline.end_of(span))
        end = max(start + 1, end if span.ended is not None and end < columns - 1 else end + 1)
        colour = COLOURS[span.mood].removeprefix("bold ") or "cyan"
        bar = letters.bars[number % len(letters.bars)]
        drawn = [bar] * (end - start)
        wide = len(span.label) + 2
        if wide <= end - start:
            first = min(1, end - start - wide)
            drawn[first : first + wide] = f" {span.label} "
        if span.late:
            drawn[0] = letters.late
        if span.ended is None:
            drawn[-1] = letters.open
        cells[start:end] = [(letter, colour) for letter in drawn]
    return cells


def _marks(lane: Lane, columns: int, at: Callable[[float], int], letters: Letters) -> Cells:
    """One letter a mark: of several at one place, their number. Signals are named where there is room."""
    cells: Cells = [(" ", "")] * columns
    places: dict[int, list[int]] = {}
    for number, mark in enumerate(lane.marks):
        places.setdefault(at(mark.at), []).append(number)
    for here, numbers in places.items():
        marks = [lane.marks[number] for number in numbers]
        mood = next((each for each in ("bad", "warn", "good") if any(mark.mood == each for mark in marks)), "")
        cells[here] = (letters.mark if len(marks) == 1 else str(len(marks)) if len(marks) < 10 else "+", COLOURS[mood])
    if lane.name not in ("signals", "cancel"):
        return cells
    for here, numbers in places.items():
        label = f" {lane.marks[numbers[0]].label} "
        for start in (here + 1, here - len(label)):
            room = cells[max(0, start) : start + len(label)]
            if start >= 0 and len(room) == len(label) and all(letter == " " for letter, _ in room):
                cells[start : start + len(label)] = [(letter, "") for letter in label]
                break
    return cells


def _table(timeline: Timeline, *, roomy: bool) -> tuple[Table, int]:
    """Spans, and the marks that are no everyday ones, in the order of time; and how many more there are."""
    rows: list[tuple[float, tuple[str, ...], str]] = []
    for lane in timeline.lanes:
        for span in lane.spans:
            start, end = span.began - timeline.began, timeline.end_of(span) - timeline.began
            until = clock(end) if span.ended is not None else "open"
            since = f"before {clock(start)}" if span.late else clock(start)
            cells = (lane.name, span.label, since, until, clock(end - start), span.detail)
            rows.append((span.began, cells, COLOURS[span.mood]))
        if lane.name != "heartbeat":
            for mark in lane.marks:
                if lane.name in ("signals", "cancel") or mark.mood in ("bad", "warn"):
                    cells = (lane.name, mark.label, clock(mark.at - timeline.began), "", "", mark.detail)
                    rows.append((mark.at, cells, COLOURS[mark.mood]))
    rows.sort(key=lambda row: row[0])
    table = Table(box=None, pad_edge=False)
    table.add_column("lane", overflow="fold", style="bold")
    table.add_column("what", overflow="fold")
    table.add_column("start", justify="right", no_wrap=True)
    if roomy:
        table.add_column("end", justify="right", no_wrap=True)
    table.add_column("length", justify="right", no_wrap=True)
    if roomy:
        table.add_column("", overflow="fold")
    for _, (name, what, since, until, length, detail), colour in rows[:MOST_LINES]:
        shown = (since, until, length, detail) if roomy else (since, length or until)
        table.add_row(Text(name), Text(what, colour), *(Text(each) for each in shown))
    return table, len(rows) - len(rows[:MOST_LINES])
