"""`supervise scripts`: what the catalogue holds, and a script of it as a job."""

from __future__ import annotations

import codecs
import errno
import os
import re
import stat
import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple, final

import trio
from attrs import Factory, frozen
from rich.cells import cell_len, set_cell_size
from rich.console import COLOR_SYSTEMS, Console
from rich.style import Style

from supervise.catalogue.catalogue import Catalogue, Match, Script, Spans
from supervise.cli import exit_codes
from supervise.cli.stdout import Stdout, put_out
from supervise.cli.streams import SPELL, on_terminal
from supervise.cli.told import is_screen
from supervise.cli.view import say
from supervise.codec import to_line
from supervise.events import AgentOutput, Event, OutputTruncated
from supervise.model import JobSpec, Limits, new_job_id
from supervise.settings import Settings

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STDOUT = 1
CHUNK = 256 * 1024
#: How long the log of what a script has printed may take to give the next piece, in seconds.
READ_PATIENCE = 10.0
#: Where a log has left out what was too much.
_LEFT_OUT = re.compile(rb"\n\[\xe2\x80\xa6 ([0-9]+) bytes left out \xe2\x80\xa6\]\n")

MISSING = "—"
#: Behind the name of a script that cannot be started, or whose header is not understood.
MARK = " !"
GAP = "  "
HEADS = ("name", "description", "tags")
#: What a column is widened to at most where no terminal bounds it: longer texts stand out.
PADDED = (60, 100, 60)
#: Of the columns, in cells, should the terminal have room for no more.
LEAST = (8, 8, 4)


@frozen(kw_only=True)
class Wanted:
    """What a script is to be run with.

    Attributes:
        name: the script's, or its path from its directory of the catalogue on.
        args: its arguments.
        stdin: what it reads from standard input.
        timeout: seconds; `None` for what its header says, or else `worker.task_timeout`.
        workspace, job_id, user, limits: as in `JobSpec`.
    """

    name: str
    args: Sequence[str] = ()
    stdin: str = ""
    timeout: float | None = None
    workspace: Path = Path(".")
    job_id: str | None = None
    user: str | None = None
    limits: Limits = Factory(Limits)


async def list_all(settings: Settings, json: bool, *, console: Console) -> int:
    """A table of all scripts; with `json`, an object a line. Returns the exit code."""
    catalogue = await _read(settings)
    _tell_troubles(catalogue, console)
    matches = [Match(script=script, name=(), description=(), tags=()) for script in catalogue.scripts]
    code = await _put_list(matches, json)
    if code == exit_codes.COMPLETED:
        say(console, f"supervise: {_count(len(matches))}{_marked(matches)}", "dim")
    return code or _code(catalogue)


async def search(settings: Settings, query: str, json: bool, *, console: Console) -> int:
    """Likewise, of the scripts whose name, description or tags hold `query`. No match is no failure."""
    catalogue = await _read(settings)
    _tell_troubles(catalogue, console)
    matches = catalogue.search(query)
    code = await _put_list(matches, json)
    if code == exit_codes.COMPLETED:
        of = f"{len(matches)} of {_count(len(catalogue.scripts))}"
        match = "matches" if len(matches) == 1 else "match"
        say(console, f"supervise: {of} {match} {_printable(query)!r}{_marked(matches)}", "dim")
    return code or _code(catalogue)


async def show(settings: Settings, name: str, json: bool, *, console: Console) -> int:
    """All that is known of a script; with `json`, one object.

    Raises:
        BadInput: there is no such script, or there are several.
    """
    catalogue = await _read(settings)
    script = catalogue.find(name)
    seconds, why = _in_force(script, settings)
    if json:
        more = {"place": script.place, "seconds": seconds, "seconds_from": why, "obstacle": script.obstacle or None}
        return await put_out(to_line({**_told(script), **more}))
    header = script.header
    rows = [
        ("name", script.name),
        ("path", script.path),
        ("description", header.description),
        ("inputs", header.inputs),
        ("outputs", header.outputs),
        ("tags", ", ".join(header.tags)),
        ("task_class", header.task_class or ""),
        ("timeout", why if seconds is None else f"{seconds:g} s ({why})"),
        ("can be run", f"no: {script.obstacle}" if script.obstacle else "yes"),
        *(("problem", problem) for problem in script.problems),
    ]
    lines = [f"{label:<11}{GAP}{_printable(value) or MISSING}\n" for label, value in rows]
    return await put_out("".join(lines).encode(Console().encoding, SPELL))


async def run(settings: Settings, wanted: Wanted, json: bool, *, console: Console) -> int:
    """Run a script as a job, show it, and return the exit code. What it prints goes to our standard output, whole.

    Args:
        settings: all bounds.
        wanted: which script, and with what.
        json: events and result as lines of JSON on standard output, and nothing else there.
        console: where people look (standard error).

    Raises:
        BadInput, SpecError: there is no such script, there are several, or it cannot be run; nothing was started.
    """
    from supervise.cli import run as jobs
    from supervise.cli.signals import Signals
    from supervise.cli.view import follow
    from supervise.job.supervisor import open_job

    signals = Signals()
    with signals.watch():
        spec: JobSpec | None = None
        with signals.preparation:
            spec = _spec((await _read(settings)).find(wanted.name), wanted, settings)
        if spec is None:
            assert signals.ended_by is not None
            return exit_codes.of_signal(signals.ended_by)
        async with open_job(spec, settings=settings) as job, job.subscribe() as events:
            signals.belong_to(job)
            stdout = Stdout(STDOUT, signals.pipe_closed)
            directory = settings.state_dir / "jobs" / job.job_id
            missing = ""
            if json:
                written = await stdout.json_lines(events)
            else:
                printed = _Printed(directory / "agent.stdout.log", settings)
                seen = printed.followed(events, not is_screen(console))
                await follow(seen, console, f"supervise scripts run · {job.job_id}")
                result = await job.result()
                written = await printed.put(result.text, stdout)
                missing = printed.missing
                jobs.tell_result(result, directory, console)
            if missing:
                say(console, f"supervise: {missing}", "red")
            if not written:
                say(console, f"supervise: nobody reads standard output; what was printed is in {directory}", "red")
            elif stdout.trouble:
                told = f"standard output cannot be written to: {stdout.trouble}; what was printed is in {directory}"
                say(console, f"supervise: {told}", "red")
    code = stdout.exit_code(exit_codes.of_result(job.result_nowait(), signals.ended_by))
    return exit_codes.FAILED if missing and code == exit_codes.COMPLETED else code


def _spec(script: Script, wanted: Wanted, settings: Settings) -> JobSpec:
    from supervise.agents.script import ScriptAgent

    return JobSpec(
        prompt=_printable(script.header.description).strip() or f"the script {script.name!r}",
        workspace=wanted.workspace,
        job_id=wanted.job_id or new_job_id(),
        agent=ScriptAgent(path=script.path, args=tuple(wanted.args), name=script.name, stdin=wanted.stdin),
        timeout=script.seconds(wanted.timeout, settings.worker.task_timeout),
        user=wanted.user,
        limits=wanted.limits,
    )


def _in_force(script: Script, settings: Settings) -> tuple[float | None, str]:
    """Seconds that it may run where nobody says otherwise, and who says so."""
    header = script.header
    if header.limit_problem:
        return None, "not known, see its problems"
    if header.timeout is not None:
        return header.timeout, "its header says so"
    if header.limit is not None:
        return header.limit, f"its task class is {header.task_class}"
    return settings.worker.task_timeout, "worker.task_timeout: its header does not say"


async def _read(settings: Settings) -> Catalogue:
    """In a thread that is left behind when a signal comes: a file system may be slow."""
    return await trio.to_thread.run_sync(Catalogue.read, settings.script_dirs, abandon_on_cancel=True)


def _tell_troubles(catalogue: Catalogue, console: Console) -> None:
    for trouble in catalogue.troubles:
        say(console, f"supervise: {trouble}", "yellow")
    if catalogue.hint:
        say(console, f"supervise: {catalogue.hint}", "yellow")


def _code(catalogue: Catalogue) -> int:
    """Nothing where something was to be found, and could not be read, is a failure."""
    return exit_codes.FAILED if catalogue.troubles and not catalogue.scripts else exit_codes.COMPLETED


def _count(count: int) -> str:
    return f"{count} script{'' if count == 1 else 's'}"


def _marked(matches: Sequence[Match]) -> str:
    count = sum(1 for match in matches if _is_marked(match.script))
    return f", {count} of them with problems (!): supervise scripts show NAME" if count else ""


def _is_marked(script: Script) -> bool:
    return bool(script.problems or script.obstacle)


def _told(script: Script) -> dict[str, Any]:
    header = script.header
    return {
        "name": script.name,
        "path": script.path,
        "description": header.description or None,
        "inputs": header.inputs or None,
        "outputs": header.outputs or None,
        "tags": list(header.tags),
        "timeout": header.timeout,
        "task_class": header.task_class,
        "executable": script.executable,
        "problems": list(script.problems),
    }


async def _put_list(matches: Sequence[Match], json: bool) -> int:
    if json:
        return await put_out(b"".join(to_line(_told(match.script)) for match in matches))
    # A pipe is no terminal to a table, whatever the colours are to be.
    out = Console() if on_terminal(sys.stdout) else Console(force_terminal=False)
    return await put_out(draw(matches, out).encode(out.encoding, SPELL))


# --- the table, laid out by hand: rich's takes seconds for thousands of rows ---------------------------------


@frozen
class _Cell:
    """A text, places in it that are highlighted, and what is never cut off its end."""

    text: str
    spans: Spans = ()
    mark: str = ""


Row = tuple[_Cell, _Cell, _Cell]


def draw(matches: Sequence[Match], out: Console) -> str:
    """The table. On a terminal it is as wide as that, its texts cut; off a terminal they are whole."""
    if not matches:
        return ""
    rows = [_row(match) for match in matches]
    natural = [max(len(head), *(_cells(row[n].text + row[n].mark) for row in rows)) for n, head in enumerate(HEADS)]
    if not out.is_terminal:
        first, second, _ = (min(width, most) for width, most in zip(natural, PADDED, strict=True))
        lines = [
            f"{_padded(name.text + name.mark, first)}{GAP}{_padded(description.text, second)}{GAP}{tags.text}\n"
            for name, description, tags in ((_Cell(HEADS[0]), _Cell(HEADS[1]), _Cell(HEADS[2])), *rows)
        ]
        return "".join(lines)
    shown = next((count for count in (3, 2) if out.width >= sum(LEAST[:count]) + len(GAP) * (count - 1)), 1)
    widths = _fitted(natural[:shown], out.width)
    bold, hit, bad = (_painter(out, style) for style in ("bold", "bold yellow", "bold red"))
    heads = [_cut(head, width)[0] for head, width in zip(HEADS, widths, strict=False)]
    lines = [_line([(head, bold(head)) for head in heads], widths)]
    for row in rows:
        parts = []
        for cell, width in zip(row, widths, strict=False):  # what has no room is left out
            text, kept = _cut(cell.text, width - len(cell.mark))
            painted = _highlighted(text, kept, cell.spans, hit) if cell.spans else text
            parts.append((text + cell.mark, painted + bad(cell.mark) if cell.mark else painted))
        lines.append(_line(parts, widths))
    return "\n".join([*lines, ""])


def _row(match: Match) -> Row:
    script = match.script
    spans: list[tuple[int, int]] = []
    at = 0
    for tag, found in zip(script.header.tags, match.tags, strict=False):  # a list has not searched
        spans += [(at + begin, at + end) for begin, end in found]
        at += len(tag) + len(", ")
    return (
        _Cell(_printable(script.name), match.name, MARK if _is_marked(script) else ""),
        _Cell(_printable(script.header.description) or MISSING, match.description),
        _Cell(_printable(", ".join(script.header.tags)) or MISSING, tuple(spans)),
    )


def _fitted(natural: Sequence[int], width: int) -> list[int]:
    """Widths of the columns: names and tags get what they need, up to a share; the description gets the rest."""
    room = width - len(GAP) * (len(natural) - 1)
    if sum(natural) <= room:
        return list(natural)
    if len(natural) < len(HEADS):
        name = min(natural[0], max(LEAST[0], room * 2 // 5)) if len(natural) > 1 else room
        return [name, room - name][: len(natural)]
    name = min(natural[0], max(LEAST[0], room * 2 // 5))
    tags = min(natural[2], max(LEAST[2], min(room // 4, room - LEAST[0] - LEAST[1])))
    description = max(LEAST[1], min(natural[1], room - name - tags))
    name = min(natural[0], max(name, room - description - tags))
    return [name, description, min(natural[2], max(tags, room - name - description))]


def _line(parts: Iterable[tuple[str, str]], widths: Sequence[int]) -> str:
    """Each part is a text and the same as it is painted, which takes no more room."""
    padded = [painted + " " * (width - _cells(text)) for (text, painted), width in zip(parts, widths, strict=True)]
    return GAP.join(padded).rstrip(" ")


def _cells(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)


def _padded(text: str, width: int) -> str:
    return text.ljust(width) if text.isascii() else text + " " * (width - cell_len(text))


def _cut(text: str, width: int) -> tuple[str, int]:
    """The text in so many cells, and how many letters of it are still its own."""
    if _cells(text) <= width:
        return text, len(text)
    kept = text[: width - 1] if text.isascii() else set_cell_size(text, width - 1)
    return f"{kept}…", len(kept)


def _highlighted(text: str, kept: int, spans: Spans, paint: Callable[[str], str]) -> str:
    parts, at = [], 0
    for begin, end in spans:
        if begin < kept:
            parts += [text[at:begin], paint(text[begin : min(end, kept)])]
            at = min(end, kept)
    return "".join((*parts, text[at:]))


def _painter(out: Console, style: str) -> Callable[[str], str]:
    system = COLOR_SYSTEMS.get(out.color_system or "")
    known = Style.parse("bold" if out.no_color else style)
    return lambda text: known.render(text, color_system=system)


def _printable(text: str) -> str:
    """In one line, and nothing that would steer a terminal; as long as it was."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else " " for letter in text)


# --- what a script has printed --------------------------------------------------------------------------------


@final
class _Printed:
    """What a script has printed, from the job's log to our standard output.

    Args:
        path: of the log.
        settings: how much it and the tail may hold.

    Attributes:
        missing: what of it is not there, and why; empty if it is whole. Known once it was put out.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.missing = ""
        self._path = path
        self._settings = settings
        self._trouble = ""

    async def followed(self, events: AsyncIterable[Event], without_it: bool) -> AsyncIterator[Event]:
        """The events; what goes to standard output, too, need not be told line by line."""
        async for event in events:
            if isinstance(event, OutputTruncated) and (event.role, event.stream) == ("agent", "stdout"):
                self._trouble = event.reason
            if not (without_it and isinstance(event, AgentOutput) and event.stream == "stdout"):
                yield event

    async def put(self, tail: str, stdout: Stdout) -> bool:
        """All that the log holds; if it cannot be read, the tail. Returns whether nothing was given up."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace") if os.isatty(STDOUT) else None
        try:
            # What stands there may have been put there by the script.
            descriptor = await _read_in_time(_open_log, self._path)
        except OSError as error:
            return await self._put_tail(tail, f"the log {self._path} cannot be read: {error.strerror}", stdout)
        try:
            self.missing = await _read_in_time(self._gap, descriptor)
            at, last = 0, b"\n"
            while data := await _read_in_time(os.pread, descriptor, CHUNK, at):
                at, last = at + len(data), data[-1:]
                if not await stdout.text(_for(decoder, data)):
                    return False
                if stdout.closed:
                    return True
        except OSError as error:
            self.missing = f"the log {self._path} cannot be read to its end: {error.strerror}"
        finally:
            os.close(descriptor)
        # What comes next on a terminal begins its own line; elsewhere each byte is the script's.
        end = b"\n" if decoder is not None and last != b"\n" else b""
        return await stdout.text(_for(decoder, b"", final=True) + end)

    async def _put_tail(self, tail: str, trouble: str, stdout: Stdout) -> bool:
        data = tail.encode("utf-8", "replace")
        if len(data) >= self._settings.tail_bytes:
            self.missing = f"{trouble}; of what it printed, only the end is known"
        return await stdout.text(data if not os.isatty(STDOUT) else _shown(tail))

    def _gap(self, descriptor: int) -> str:
        """What is missing in the log, if anything. Blocking."""
        limit = self._settings.log_max_bytes
        # Where its first half ends. Events tell of it, too, but who prints so much loses some of them.
        found = _LEFT_OUT.match(os.pread(descriptor, 100, limit // 2))
        if found is not None and os.fstat(descriptor).st_size > limit // 4 * 3:
            more = f"{int(found[1])} bytes are missing; raise log_max_bytes"
            return f"what it printed is longer than log_max_bytes ({limit}): {more}"
        return f"not all that it printed is in the log: {self._trouble}" if self._trouble else ""


def _open_log(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file any more")
    return descriptor


async def _read_in_time(read: Callable[[*Ts], T], *args: *Ts) -> T:
    """`read(*args)` in a thread, which is left behind where the file system does not answer: that is an OSError."""
    with trio.move_on_after(READ_PATIENCE):
        return await trio.to_thread.run_sync(read, *args, abandon_on_cancel=True)
    raise OSError(errno.ETIMEDOUT, f"it did not answer within {READ_PATIENCE:g} s")


def _for(decoder: codecs.IncrementalDecoder | None, data: bytes, final: bool = False) -> bytes:
    """What a program gets as it is, and a person without what would steer the terminal."""
    return data if decoder is None else _shown(decoder.decode(data, final))


def _shown(text: str) -> bytes:
    from supervise.cli.tasks import printable  # late: a list does without all that this one needs

    return printable(text).encode("utf-8", "replace")
