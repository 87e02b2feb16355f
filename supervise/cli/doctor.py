"""`supervise doctor`: what this machine gives, what is missing, and how to mend it."""

from __future__ import annotations

import os
import resource
import shutil
from typing import Literal

import trio
from attrs import asdict, frozen
from rich.console import Console
from rich.table import Table
from rich.text import Text

from supervise.cli import exit_codes
from supervise.cli.stdout import Stdout
from supervise.codec import to_json, to_line
from supervise.errors import SuperviseError
from supervise.model import Limits, StopPolicy, SweepReport
from supervise.processes.child import TreeOptions, open_tree
from supervise.processes.containment import Command
from supervise.processes.hurry import Hurry
from supervise.processes.records import leftovers
from supervise.processes.sweep import sweep
from supervise.processes.tiers import Containments, open_containments
from supervise.settings import Settings

#: Descriptors that a running job needs: pipes, sockets and pidfds of its trees, logs.
DESCRIPTORS_OF_A_JOB = 30

#: How long a program may take to say its version, in seconds.
VERSION_TIMEOUT = 20.0

Level = Literal["ok", "warning", "error"]
STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


@frozen
class Check:
    """One line: what was looked at, how it is, and what to do about it."""

    name: str
    level: Level
    text: str
    mend: str = ""


async def run(settings: Settings, clean: bool, json: bool, *, console: Console) -> int:
    """Check, print, and return the exit code: 1 if there is an error.

    Args:
        settings: whose state directory, programs and containment are looked at.
        clean: end what killed supervisors have left, too.
        json: one JSON object on standard output.
        console: not used: what the doctor says goes to standard output.
    """
    checks = [_state_directory(settings)]
    report: SweepReport | None = None
    tier = ""
    if checks[0].level == "ok":
        if clean:
            report = await sweep(settings.state_dir, grace=settings.orphan_grace, kill_wait=settings.kill_wait)
            checks.append(_swept(report))
        else:
            checks.append(await trio.to_thread.run_sync(_left, settings))
        tier, containment = await _containment(settings)
        checks += containment
    checks.append(_descriptors())
    checks.append(await _program("agent", settings.agent.command, settings, "agent.command"))
    checks.append(await _program("index", settings.index.command, settings, "index.command"))
    if json:
        told = {
            "type": "doctor",
            "containment": tier,
            "checks": [asdict(check) for check in checks],
            "sweep": None if report is None else to_json(report),
        }
        await Stdout(1, lambda: None).text(to_line(told))
    else:
        _print(checks)
    return exit_codes.FAILED if any(check.level == "error" for check in checks) else exit_codes.COMPLETED


def _state_directory(settings: Settings) -> Check:
    directory = settings.state_dir
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = None if os.access(directory, os.W_OK | os.X_OK) else "no right to write there"
    except OSError as error:
        problem = error.strerror or type(error).__name__
    if problem is None:
        return Check("state", "ok", f"{directory} can be written")
    return Check("state", "error", f"{directory}: {problem}", "set state_dir (SUPERVISE_STATE_DIR) to one of yours")


def _left(settings: Settings) -> Check:
    found = leftovers(settings.state_dir)
    for each in found:
        each.close(keep=True)
    if not found:
        return Check("leftovers", "ok", "no supervisor has left anything")
    count = f"{len(found)} supervisor{'s' if len(found) > 1 else ''} ended without taking back what they had"
    return Check("leftovers", "warning", count, "supervise doctor --sweep ends it now; else the next job's start does")


def _swept(report: SweepReport) -> Check:
    if not report.supervisors:
        return Check("leftovers", "ok", "no supervisor has left anything")
    found = ", ".join(f"{each.pid} ({each.command})" for each in report.found)
    text = f"{report.supervisors} killed supervisors, {len(report.found)} processes"
    text += f" ended: {found}" if found else ""
    text += f"; {report.groups} cgroups removed" if report.groups else ""
    if not report.survivors:
        return Check("leftovers", "ok", text)
    lives = "; ".join(f"{each.pid} ({each.command}): {each.reason}" for each in report.survivors)
    return Check("leftovers", "error", f"{text}; still alive: {lives}", "end them as their user, or as root")


async def _containment(settings: Settings) -> tuple[str, list[Check]]:
    """Not only probed: a program is started in it."""
    try:
        async with open_containments(settings) as containments:
            await _try(containments)
            tier, notes = containments.tier, containments.notes
    except (SuperviseError, OSError) as error:
        return "", [Check("containment", "error", str(error), "set containment to auto, guardian or process-group")]
    weak = tier == "process group"
    mend = "a supervisor killed with -9 leaves its children until the next start" if weak else ""
    checks = [Check("containment", "warning" if weak else "ok", tier, mend)]
    checks += [Check("containment", "ok", f"not better, because {note}") for note in notes]
    return tier, checks


async def _try(containments: Containments) -> None:
    options = TreeOptions(mark="doctor", contain=containments.of_job("doctor", Limits()))
    command = Command(argv=("/bin/sh", "-c", ":"), cwd="/", env={})
    async with open_tree("doctor", StopPolicy(), Hurry(), options=options, emit=lambda event: None) as tree:
        child = await tree.spawn(command)
        with trio.fail_after(VERSION_TIMEOUT):
            await child.wait()


def _descriptors() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    jobs = soft // DESCRIPTORS_OF_A_JOB
    text = f"{soft} open files, enough for about {jobs} jobs at a time"
    if jobs >= 20:
        return Check("descriptors", "ok", text)
    return Check("descriptors", "warning", text, f"raise it: ulimit -n {min(hard, 4096) if hard > 0 else 4096}")


async def _program(name: str, argv: tuple[str, ...], settings: Settings, setting: str) -> Check:
    path = shutil.which(argv[0])
    if path is None:
        text = f"{argv[0]!r} was not found"
        return Check(name, "warning", text, f"install it, or name another by {setting}; the demo needs none")
    options = TreeOptions(mark="doctor")
    command = Command(argv=(path, *argv[1:], "--version"), cwd="/", env=dict(os.environ))
    try:
        async with open_tree("doctor", StopPolicy(), Hurry(), options=options, emit=lambda event: None) as tree:
            child = await tree.spawn(command)
            with trio.move_on_after(VERSION_TIMEOUT):
                await child.wait()
                await child.drained()
    except SuperviseError as error:
        return Check(name, "error", str(error), f"name another by {setting}")
    said = " ".join(child.tails()[0].split())[:80]
    if child.status is None or not child.status.ok:
        return Check(name, "warning", f"{path} --version did not answer well ({child.status})", "run it by hand")
    return Check(name, "ok", f"{path}: {said}" if said else path)


def _print(checks: list[Check]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for check in checks:
        text = Text(check.text)
        if check.mend:
            text.append(f"\n→ {check.mend}", "dim")
        table.add_row(Text(check.level, STYLES[check.level]), check.name, text)
    Console().print(table)
