"""What `supervise doctor` looks at. Each check stands alone, has a bound, and never raises."""

from __future__ import annotations

import errno
import math
import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal, TypeVar

import trio
from attrs import Factory, define, frozen

from supervise.cli.redis_server import RedisTrouble, address_of, secrets_of, version_of
from supervise.dispatch.watching import Inotify, sees_nothing
from supervise.errors import MissingExtra, SuperviseError
from supervise.model import Limits, StopPolicy, SweepReport
from supervise.processes import machine
from supervise.processes.child import TreeOptions, open_tree
from supervise.processes.containment import Command
from supervise.processes.hurry import Hurry
from supervise.processes.records import leftovers
from supervise.processes.sweep import sweep
from supervise.processes.tiers import Containments, open_containments
from supervise.secrets import Masker, secret_values
from supervise.settings import Settings

__all__ = ["Check", "Findings", "examine", "masker_of"]

#: Descriptors that a running job needs: pipes, sockets and pidfds of its trees, logs.
DESCRIPTORS_OF_A_JOB = 30
#: How long a program may take to say its version, in seconds.
VERSION_TIMEOUT = 20.0
#: How long a whole check may take, in seconds: a file system of a dead server answers never.
LONGEST = 60.0
REDIS_TIMEOUT = 5.0
#: How long processes are looked through for what they watch, in seconds.
LOOK = 1.0
#: File systems whose clock differs by more seconds than this are told of. Some count in steps of two.
SKEW = 2.0
#: The clock cannot be right before.
YEAR = 2026
#: Free bytes in the state directory, and free watches, under which there is a warning.
LITTLE_SPACE = 1024**3
FEW_WATCHES = 8192
#: With it came XAUTOCLAIM.
REDIS = (6, 2)

Level = Literal["ok", "warning", "error"]
T = TypeVar("T")


@frozen
class Check:
    """One line: what was looked at, how it is, and what to do about it."""

    name: str
    level: Level
    text: str
    mend: str = ""


@define
class Findings:
    """What the checks have found, in the order in which it is told."""

    checks: list[Check] = Factory(list)
    tier: str = ""
    report: SweepReport | None = None


def masker_of(settings: Settings) -> Masker:
    """Of all secrets that the checks may meet."""
    url = settings.redis.url
    known = {settings.index.voyage_api_key, settings.http.token, *(() if url is None else secrets_of(url))}
    return Masker({*filter(None, known), *secret_values(os.environ), *secret_values(settings.agent.env)})


async def examine(settings: Settings, clean: bool) -> Findings:
    """Do all checks, those that wait for something at the same time.

    Args:
        settings: whose directories, programs, containment and Redis are looked at.
        clean: end what killed supervisors have left, too.
    """
    findings = Findings()
    # First, and alone: others look at what it makes.
    state = await guarded("state", lambda: _in_thread(_state_directory, settings), LONGEST)
    # Whoever else looks at a file system that does not answer would not answer, either.
    hangs = state == [_no_answer("state", LONGEST)]
    masker = masker_of(settings)
    checks: dict[str, tuple[Callable[[], Awaitable[list[Check]]], float]] = {
        # Each part of it has a bound of its own.
        "containment": (lambda: _trees(settings, clean, findings), math.inf),
        "descriptors": (lambda: _in_thread(_descriptors), LONGEST),
        "inotify": (lambda: _inotify(Path("/") if hangs else settings.state_dir, settings), LONGEST),
        "clock": (lambda: _clocks(None if hangs else settings.state_dir), math.inf),
        "agent": (lambda: _program("agent", settings.agent.command, "agent.command", masker), LONGEST),
        "index": (lambda: _program("index", settings.index.command, "index.command", masker), LONGEST),
        "git": (lambda: _program("git", ("git",), "", masker), LONGEST),
        "redis": (lambda: _redis(settings), LONGEST),
        "root": (lambda: _roots(settings), math.inf),
    }
    if state[0].level == "error":
        del checks["containment"]
    found: dict[str, list[Check]] = {}

    async def do(name: str) -> None:
        check, bound = checks[name]
        found[name] = await guarded(name, check, bound)

    async with trio.open_nursery() as nursery:
        for name in checks:
            nursery.start_soon(do, name)
    findings.checks = state + [check for name in checks for check in found[name]]
    return findings


async def guarded(name: str, check: Callable[[], Awaitable[list[Check]]], bound: float) -> list[Check]:
    """What a check says. One that fails by itself, or does not end within `bound` seconds, is an error, too."""
    with trio.move_on_after(bound):
        try:
            return await check()
        except Exception as error:
            return [Check(name, "error", f"cannot be checked: {type(error).__name__}: {error}", "report this, please")]
    return [_no_answer(name, bound)]


def _no_answer(name: str, bound: float) -> Check:
    return Check(name, "error", f"no answer within {bound:g} s", "look what the file system or program waits for")


async def _in_thread(function: Callable[..., T], *args: object) -> T:
    """In a thread that is left behind where it blocks for ever."""
    return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True)


def _state_directory(settings: Settings) -> list[Check]:
    directory = settings.state_dir
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        mend = "set state_dir (SUPERVISE_STATE_DIR) to one of yours"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            mend = "make room there, or set state_dir (SUPERVISE_STATE_DIR) to another directory"
        return [Check("state", "error", f"{directory}: {error.strerror or type(error).__name__}", mend)]
    space = os.statvfs(directory)
    free = space.f_bavail * space.f_frsize
    text = f"{directory} can be written; {free / 2**30:.1f} GiB are free"
    if free < LITTLE_SPACE:
        mend = "make room, or set jobs_max_bytes, jobs_max_age and log_max_bytes lower"
        return [Check("state", "warning", text, mend)]
    return [Check("state", "ok", text)]


async def _trees(settings: Settings, clean: bool, findings: Findings) -> list[Check]:
    """What was left, then what holds trees: the one is not to meet the record of the other."""
    if clean:  # takes as long as the settings give the processes
        checks = await guarded("leftovers", lambda: _sweep(settings, findings), math.inf)
    else:
        checks = await guarded("leftovers", lambda: _in_thread(_left, settings), LONGEST)
    return checks + await guarded("containment", lambda: _containment(settings, findings), LONGEST)


async def _sweep(settings: Settings, findings: Findings) -> list[Check]:
    findings.report = await sweep(settings.state_dir, grace=settings.orphan_grace, kill_wait=settings.kill_wait)
    return [_swept(findings.report)]


def _left(settings: Settings) -> list[Check]:
    found = leftovers(settings.state_dir)
    for each in found:
        each.close(keep=True)
    if not found:
        return [Check("leftovers", "ok", "no supervisor has left anything")]
    count = f"{len(found)} supervisor{'s' if len(found) > 1 else ''} ended without taking back what they had"
    return [
        Check("leftovers", "warning", count, "supervise doctor --sweep ends it now; else the next job's start does")
    ]


def _swept(report: SweepReport) -> Check:
    if not report.supervisors:
        return Check("leftovers", "ok", "no supervisor has left anything")
    found = ", ".join(f"{each.pid} ({each.command})" for each in report.found)
    text = f"{_count(report.supervisors, 'killed supervisor')}, {_count(len(report.found), 'process', 'es')}"
    text += f" ended: {found}" if found else ""
    text += f"; {report.groups} cgroups removed" if report.groups else ""
    if not report.survivors:
        return Check("leftovers", "ok", text)
    lives = "; ".join(f"{each.pid} ({each.command}): {each.reason}" for each in report.survivors)
    return Check("leftovers", "error", f"{text}; still alive: {lives}", "end them as their user, or as root")


def _count(number: int, what: str, more: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else more}"


async def _containment(settings: Settings, findings: Findings) -> list[Check]:
    """Not only probed: a program is started in it."""
    try:
        async with open_containments(settings) as containments:
            await _try(containments)
            tier, notes = containments.tier, containments.notes
    except (SuperviseError, OSError) as error:
        return [Check("containment", "error", str(error), "set containment to auto, guardian or process-group")]
    findings.tier = tier
    weak = tier == "process group"
    mend = "a supervisor killed with -9 leaves its children until the next start" if weak else ""
    checks = [Check("containment", "warning" if weak else "ok", tier, mend)]
    return checks + [Check("containment", "ok", f"not better, because {note}") for note in notes]


async def _try(containments: Containments) -> None:
    options = TreeOptions(mark="doctor", contain=containments.of_job("doctor", Limits()))
    command = Command(argv=("/bin/sh", "-c", ":"), cwd="/", env={})
    async with open_tree("doctor", StopPolicy(), Hurry(), options=options, emit=lambda event: None) as tree:
        child = await tree.spawn(command)
        with trio.fail_after(VERSION_TIMEOUT):
            await child.wait()


def _descriptors() -> list[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    jobs = soft // DESCRIPTORS_OF_A_JOB
    text = f"{soft} open files, enough for about {jobs} jobs at a time"
    if soft == resource.RLIM_INFINITY:
        return [Check("descriptors", "ok", "any number of open files")]
    if jobs >= 20:
        return [Check("descriptors", "ok", text)]
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    mend = f"raise it: ulimit -n {wanted}"
    if wanted <= soft:
        mend = "only root can raise it: LimitNOFILE= of a service of systemd, or /etc/security/limits.conf"
    return [Check("descriptors", "warning", text, mend)]


async def _inotify(directory: Path, settings: Settings) -> list[Check]:
    """Tried, not only counted: instances are counted for each user, also by other programs."""
    limits = await _in_thread(machine.inotify_limits)
    use = await _in_thread(machine.inotify_use, LOOK)
    at_least = "" if use.whole else "at least "
    text = "; ".join(
        f"{at_least}{used} of {limit} {what} used"
        for used, limit, what in (
            (use.instances, limits.instances, "instances"),
            (use.watches, limits.watches, "watches"),
        )
        if limit is not None
    )
    text = text or "the kernel does not tell its limits"
    if limits.events is not None:
        text += f"; {limits.events} events may wait"
    try:
        watching = await _in_thread(_watch, directory)
    except MissingExtra as error:
        return [Check("inotify", "warning", "a worker has to poll its directory", str(error))]
    except OSError as error:
        mend = "raise fs.inotify.max_user_instances and max_user_watches (sysctl -w), or the limit of open files"
        return [Check("inotify", "warning", f"nothing can be watched: {error.strerror}; {text}", mend)]
    watching.close()
    wanted = settings.worker.max_concurrent + 1  # a watch of each index, and the worker's own
    if limits.instances is not None and limits.instances - use.instances < wanted:
        mend = f"sysctl -w fs.inotify.max_user_instances={max(512, 2 * limits.instances)}"
        return [Check("inotify", "warning", f"{text}; {wanted} instances may be needed", mend)]
    if limits.watches is not None and limits.watches - use.watches < FEW_WATCHES:
        mend = f"sysctl -w fs.inotify.max_user_watches={max(524288, 2 * limits.watches)}"
        return [Check("inotify", "warning", f"{text}; the index watches each directory of a workspace", mend)]
    return [Check("inotify", "ok", text)]


def _watch(directory: Path) -> Inotify:
    """Blocks: also, to find the C library, Python may run a program."""
    return Inotify(directory if directory.is_dir() else Path("/"))


async def _clocks(state_dir: Path | None) -> list[Check]:
    """That of the kernel, and that of the file system of `state_dir`, which may not answer."""
    checks = await guarded("clock", lambda: _in_thread(_clock), LONGEST)
    if state_dir is not None:
        checks += await guarded("clock", lambda: _in_thread(_skew, "state_dir", state_dir), LONGEST)
    return checks


def _clock() -> list[Check]:
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    if time.gmtime().tm_year < YEAR:
        return [Check("clock", "error", f"it says {now} UTC, which is over", "set it: timedatectl set-ntp true")]
    wrong = machine.clock_error()
    if wrong is None:
        return [Check("clock", "ok", f"{now} UTC; whether anything sets it cannot be told here")]
    if wrong == math.inf:
        mend = (
            "run an NTP client (timedatectl set-ntp true, chronyd), on the host of a container; tasks and logs go by it"
        )
        return [Check("clock", "warning", f"{now} UTC; the kernel says that nothing keeps it right", mend)]
    return [Check("clock", "ok", f"{now} UTC, right to {wrong:.3f} s")]


def _skew(name: str, directory: Path) -> list[Check]:
    try:
        if not directory.is_dir():
            return []
        skew = machine.clock_skew(directory)
    except OSError:
        return []  # another check tells that nothing can be written there
    if abs(skew) <= SKEW:
        return [Check("clock", "ok", f"the file system of {name} goes by the same time")]
    way = "ahead of" if skew > 0 else "behind"
    text = f"the file system of {name} ({directory}) is {abs(skew):.1f} s {way} our clock"
    return [Check("clock", "warning", text, "let both machines keep their clocks by NTP, or use a local directory")]


async def _program(name: str, argv: tuple[str, ...], setting: str, masker: Masker) -> list[Check]:
    """`setting` names it; without one, it is a program that we can do without."""
    path = await _in_thread(shutil.which, argv[0])
    if path is None:
        mend = f"install it, or name another by {setting}; the demo needs none"
        if not setting:
            mend = "install it; without it, the files of a workspace are looked at one by one for changes"
        # An absolute name is not looked for.
        there = await _in_thread(os.path.exists, argv[0]) if "/" in argv[0] else False
        problem = "is not executable" if there else "was not found"
        return [Check(name, "warning", f"{argv[0]!r} {problem}", mend)]
    options = TreeOptions(mark="doctor", masker=masker)  # before anything is cut
    command = Command(argv=(path, *argv[1:], "--version"), cwd="/", env=dict(os.environ))
    try:
        async with open_tree("doctor", StopPolicy(), Hurry(), options=options, emit=lambda event: None) as tree:
            child = await tree.spawn(command)
            with trio.move_on_after(VERSION_TIMEOUT) as scope:
                await child.wait()
                await child.drained()
    except SuperviseError as error:
        return [Check(name, "error", str(error), f"name another by {setting}" if setting else "install it anew")]
    said = " ".join(child.tails()[0].split())[:80]
    if scope.cancelled_caught:
        problem = f"{path} --version did not answer within {VERSION_TIMEOUT:g} s"
        return [Check(name, "warning", problem, "run it by hand")]
    if child.status is None or not child.status.ok:
        return [Check(name, "warning", f"{path} --version did not answer well ({child.status})", "run it by hand")]
    return [Check(name, "ok", f"{path}: {said}" if said else path)]


async def _redis(settings: Settings, seconds: float = REDIS_TIMEOUT) -> list[Check]:
    if settings.redis.url is None:
        return [Check("redis", "ok", "not used (redis.url is unset)")]
    try:
        address = address_of(settings.redis.url)
        with trio.move_on_after(seconds) as scope:
            version = await version_of(address)
    except RedisTrouble as error:
        return [Check("redis", "error", str(error), error.mend)]
    if scope.cancelled_caught:
        mend = "look whether it runs, and whether a firewall lies between"
        return [Check("redis", "error", f"{address}: no answer within {seconds:g} s", mend)]
    numbers = re.match(r"([0-9]{1,6})\.([0-9]{1,6})(\.[0-9]{1,6})*", version)
    if numbers is None:
        mend = "use a Redis of version 6.2 or later"
        return [Check("redis", "warning", f"{address} answers, but does not tell its version", mend)]
    text = f"{address}: version {numbers[0][:20]}"
    if (int(numbers[1]), int(numbers[2])) < REDIS:
        return [Check("redis", "error", f"{text} is too old", "install version 6.2 or later")]
    return [Check("redis", "ok", text)]


async def _roots(settings: Settings) -> list[Check]:
    """The root of workers, and, if it answers, the clock of its file system."""
    checks = await guarded("root", lambda: _in_thread(_root, settings), LONGEST)
    root = settings.worker.root
    if root is not None and checks != [_no_answer("root", LONGEST)]:
        checks += await guarded("clock", lambda: _in_thread(_skew, "worker.root", root), LONGEST)
    return checks


def _root(settings: Settings) -> list[Check]:
    root = settings.worker.root
    if root is None:
        return []
    there = next(each for each in (root, *root.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        mend = "set worker.root (SUPERVISE_WORKER__ROOT) to a directory of yours"
        return [Check("root", "error", f"{root}: {there} is no directory that we may write to", mend)]
    text = f"{root} can be written" if there == root else f"{root} does not exist; a worker makes it"
    if remote := sees_nothing(there):
        mend = f"a worker polls it every {settings.worker.poll_interval:g} s; to be told at once, use a local directory"
        return [Check("root", "warning", f"{text}; on {remote}, nobody tells of changes", mend)]
    return [Check("root", "ok", text)]
