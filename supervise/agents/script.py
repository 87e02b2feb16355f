"""A script as an agent: a program that speaks no protocol. What it prints is its result, its exit code the verdict."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from typing import final

from attrs import Factory, field, frozen

from supervise.agents.protocol import AgentRun
from supervise.codec import register_agent
from supervise.errors import SpawnError, SpecError
from supervise.events import AgentOutput
from supervise.model import AgentReport, ExitStatus, FailureKind
from supervise.processes.child import Child
from supervise.processes.output import Lines
from supervise.rules import rules

__all__ = ["ScriptAgent"]

_r = rules(SpecError)

#: Of what the script says of its failure, in characters.
_CLIP = 300


def _absolute(value: str | os.PathLike[str]) -> str:
    """Scripts run in a workspace: what was relative to here would be another file there."""
    if value == "" or not isinstance(value, str | os.PathLike):
        return value  # left to the validator
    path = os.fspath(value)
    # abspath() of some Pythons cuts at a NUL; the validator refuses it.
    return path if "\0" in path else os.path.abspath(path)


def _texts(value: Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise SpecError(f"ScriptAgent.args is the text {value!r}, but must be a list of texts: write [{value!r}]")
    return tuple(value)


def _name(agent: ScriptAgent) -> str:
    return os.path.splitext(os.path.basename(agent.path))[0] if isinstance(agent.path, str) else "script"


_text = _r.check(lambda v: isinstance(v, str) and bool(v) and "\0" not in v, "a text without NUL, not empty")


@final
@frozen(kw_only=True)
class ScriptAgent:
    """Runs a script, or any other program, in the job's workspace.

    It is started as it is, by its own `#!` line. Exit code 0 completes the job; the result's text is the end of what
    the script printed (`Settings.tail_bytes`), all of it is in the job's log. Any other exit code is an
    `agent_error`, told with the last line of standard error.

    Attributes:
        path: of the script. A relative one is made absolute here and now.
        args: its arguments.
        name: what it is called in events; default the file's name without its suffix.
        stdin: what it reads from standard input; `None` for the job's prompt. It need not read it.

    Raises:
        SpecError: a bad value; the message names field, value and rule.
    """

    path: str = field(
        converter=_absolute,
        validator=_r.check(lambda v: isinstance(v, str) and bool(v) and "\0" not in v, "the path of a script"),
    )
    args: tuple[str, ...] = field(
        default=(),
        converter=_texts,
        validator=_r.check(
            lambda v: all(isinstance(text, str) and "\0" not in text for text in v), "a list of texts without NUL"
        ),
    )
    name: str = field(default=Factory(_name, takes_self=True), validator=_text)
    stdin: str | None = field(
        default=None, validator=_r.check(lambda v: v is None or isinstance(v, str), "a text, or None")
    )

    async def run(self, run: AgentRun) -> None:
        """See `Agent.run`."""
        stdin = run.spec.prompt if self.stdin is None else self.stdin
        command = run.command((self.path, *self.args), stdin=_bytes(stdin))
        streams = (_Stream(run, "stdout"), _Stream(run, "stderr"))
        child: Child | None = None
        ended = False
        try:
            async with run.tree() as tree:
                child = await tree.spawn(command, stdout=streams[0].feed, stderr=streams[1].feed)
                run.started(child.pid)
                await child.wait()
                ended = True  # by itself: how it answers when it is ended is no verdict
        except SpawnError as error:
            run.report(AgentReport(failure_kind=FailureKind.SPAWN, error=self._unstarted(error)))
        finally:
            if child is not None:
                for stream in streams:
                    stream.close()
                run.report(self._report(child.status, child.tails(), ended))

    def _report(self, status: ExitStatus | None, tails: tuple[str, str], ended: bool) -> AgentReport:
        kind: FailureKind | None = FailureKind.KILLED
        error: str | None = f"the script {self.name!r} was ended"
        if ended:
            kind, error = self._verdict(status, tails[1])
        return AgentReport(
            failure_kind=kind,
            error=error,
            text=tails[0],
            exit=status,
            finished=kind is None,
            stdout_tail=tails[0],
            stderr_tail=tails[1],
        )

    def _verdict(self, status: ExitStatus | None, stderr: str) -> tuple[FailureKind | None, str | None]:
        if status is None:
            return FailureKind.KILLED, f"the script {self.name!r} ended, and how is not known"
        if status.ok:
            return None, None
        error = f"the script {self.name!r} ended with {status}"
        if status.signal is not None:
            return FailureKind.KILLED, error
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else ""
        said = last if len(last) <= _CLIP else last[: _CLIP - 1] + "…"
        return FailureKind.AGENT_ERROR, f"{error}: {said}" if said else error

    def _unstarted(self, error: SpawnError) -> str:
        """What to do about it: the general words are of programs that are looked for on the PATH."""
        match error.kind:
            case "not_executable" if not _has_mode(self.path):
                return f"the script {self.path!r} is not executable: chmod +x {_quoted(self.path)}"
            case "not_executable":
                return (
                    f"the script {self.path!r} may not be executed by this user here; look at the modes of its "
                    "directories, at its interpreter's (the #! line), and whether its file system is mounted noexec"
                )
            case "bad_format":
                return f"the script {self.path!r} has no #! line; let its first line name its interpreter: #!/bin/sh"
            case "not_found" if not os.path.exists(self.path):
                return f"the script {self.path!r} is not there"
            case "not_found":
                return f"the interpreter of the script {self.path!r} is not there; see its #! line"
        return str(error)


@final
class _Stream:
    """Tells a stream's lines."""

    def __init__(self, run: AgentRun, name: str) -> None:
        self._run = run
        self._name = name
        self._lines = Lines(self._line)
        self.close: Callable[[], None] = self._lines.close

    def feed(self, data: bytes) -> None:
        self._run.progress(0)  # the beginning of a long line is life, too
        self._lines.feed(data)

    def _line(self, line: str) -> None:
        self._run.progress()
        self._run.emit(AgentOutput(stream=self._name, line=line))


def _quoted(path: str) -> str:
    """For a shell; one that would steer a terminal as Python writes it."""
    return shlex.quote(path) if path.isprintable() else repr(path)


def _bytes(text: str) -> bytes:
    """Bytes that were no UTF-8 when they came are what they were."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # other lone surrogates, out of JSON
        return text.encode("utf-8", "replace")


def _has_mode(path: str) -> bool:
    try:
        return os.stat(path).st_mode & 0o111 != 0
    except OSError:  # in a directory that may not be entered, say
        return True


register_agent(ScriptAgent, "script")
