"""`python -m benchmarks.chaos`: kill what supervises, at random moments, and look for whoever is left.

Three kinds of processes take part. The **referee** is this one; it owns nobody, and finds the others by its own
means (chaos_finder.py). A **supervising process** (chaos_supervisor.py) runs a job with a watch and an agent, one for
each trial. Their **children** (chaos_children.py) do their worst.

In each trial one victim is killed, or stopped, at a moment that the seed decides. When the supervising process is
dead, everything must be gone after `orphan_grace` and 2 s, counted from the kill. When it lives, its job is cancelled
(or ends by itself), and with its result nobody may be left; counted from the cancel. Then: no record (after a sweep, if
the supervising process was killed), no cgroup, no descriptor more than before.

`--only both` and `--only all` show what cannot be kept: guardian and zygote, or these and the supervising process, are
stopped and then killed at once.

The exit code is 1 if anything was left, and 2 if the referee does not find what it has hidden itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import pwd
import random
import secrets
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from benchmarks import chaos_children
from benchmarks.chaos_finder import LOOK, Finder, Sight, now_in_ticks, send, sight
from benchmarks.chaos_supervisor import FLUSH, GUARDIAN_TIMEOUT, KILL_WAIT, ORPHAN_GRACE, TERMINATION

#: What the kills may take, in seconds, on a machine that has other work, too.
KILLS = 2.0
#: From the loss of the supervisor, and from the cancel of a job.
ORPHANS_GONE = ORPHAN_GRACE + KILLS
JOB_GONE = TERMINATION + FLUSH + TERMINATION + KILLS
#: What a stopped guardian or zygote adds: requests that it leaves unanswered.
STOPPED = 2 * GUARDIAN_TIMEOUT
#: What a tree adds that cannot be emptied: `kill_wait`, for the agent's and for the watch's.
UNENDED = 2 * KILL_WAIT
#: No answer of a supervising process takes so long.
PATIENCE = 20.0
#: How many survivors of one trial are told.
TOLD = 5
#: When nobody ends them, those that live after so many seconds live on.
NOBODY_ENDS_THEM = 0.5

TIERS = ("auto", "cgroup", "guardian", "process-group")
MIX = {"none": 2, "supervisor": 4, "guardian": 3, "zygote": 3, "watch": 1, "agent": 1}
VICTIMS = (*MIX, "both", "all")
PHASES = ("before", "watch", "agent", "teardown", "end")
#: What a leader does after it has started its children.
LEADERS: tuple[list[str], ...] = ([], [], [], ["ignore"], ["ignore"], ["breed"], ["close"], ["traced"], ["stop"])
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)

Message = dict[str, Any]


class NotFoundError(Exception):
    """The referee has missed what it had hidden itself, so that nothing it says is worth anything."""


# --- what is to happen -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One trial. All that chance decides is in here."""

    number: int
    victim: str
    signal: signal.Signals
    phase: str
    delay: float  # from the beginning of the phase to the kill
    pause: float  # from the kill to the cancel; or from SIGSTOP to SIGCONT
    which: float  # of several guardians
    twice: bool  # a plain job first, so that descriptors can be compared
    agent: Message
    watch: Message

    @property
    def strike(self) -> str:
        """Who gets what."""
        return self.victim if self.victim == "none" else f"{self.victim} {self.signal.name}"

    def told(self) -> str:
        """In one line."""
        children = {"agent": [self.agent["leader"], *self.agent["children"]]}
        children["watch"] = [self.watch["leader"], *self.watch["children"]]
        return (
            f"trial {self.number}: {self.strike} in {self.phase} +{self.delay:.3f} s, leader and children: {children}"
        )


def plan_trial(seed: int, number: int, tier: str, only: str | None) -> Plan:
    """What chance decides for this trial: the same for the same seed and number."""
    chance = random.Random(f"{seed}:{number}")
    victim = chance.choices(list(MIX), list(MIX.values()))[0]
    phase = chance.choice(PHASES)
    if tier == "process-group" and victim in ("guardian", "zygote"):
        victim = chance.choice(("none", "supervisor", "watch", "agent"))
    if only is not None:
        victim = only
    if (victim in ("both", "all") and phase == "before") or (victim == "agent" and phase in ("before", "end")):
        phase = "agent"  # there is nobody yet, or no more
    if victim == "watch" and phase == "before":
        phase = "watch"
    spans = {"before": 0.1, "watch": 0.08, "agent": 0.3, "teardown": 0.5, "end": 0.3}
    return Plan(
        number=number,
        victim=victim,
        signal=signal.SIGKILL if victim in ("both", "all") else chance.choice(SIGNALS),
        phase=phase,
        delay=chance.uniform(0, spans[phase]),
        pause=chance.uniform(0, 0.5 if victim == "supervisor" else 0.2),
        which=chance.random(),
        twice=chance.random() < 0.2,
        agent={
            "children": [_flags(chance) for _ in range(chance.randint(1, 5))],
            "leader": chance.choice(LEADERS) if phase != "end" else [],
            "life": chance.uniform(0, 0.3) if phase == "end" else None,
        },
        watch={
            "children": [_flags(chance) for _ in range(chance.choice((0, 0, 1, 2)))],
            "leader": chance.choice(LEADERS),
        },
    )


def _flags(chance: random.Random) -> list[str]:
    """What one child does. At most one of those after which nothing else can be done."""
    before = [name for name in chaos_children.FLAGS if name not in chaos_children.LAST]
    flags = chance.sample(before, chance.randint(0, 5))
    return flags + ([chance.choice(chaos_children.LAST)] if chance.random() < 0.6 else [])


# --- what has happened -------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What came of a trial."""

    plan: Plan
    tier: str = ""
    struck: bool = False
    seconds: float | None = None  # to empty
    bound: float = 0.0
    survivors: list[str] = field(default_factory=list)
    unswept: list[str] = field(default_factory=list)  # who lives even after the next supervisor's sweep
    found: int = 0  # by that sweep
    leftovers: dict[str, str] = field(default_factory=dict)  # kind, what
    helpers: int = 0  # how many the referee has seen
    log: str = ""

    @property
    def good(self) -> bool:
        """Nothing is left."""
        return not (self.survivors or self.unswept or self.leftovers)


class SupervisingProcess:
    """The referee's end of one."""

    def __init__(self, pid: int, control: socket.socket, finder: Finder) -> None:
        self.pid = pid
        self.control = control
        self.finder = finder
        found = sight(pid)
        assert found is not None, "it waits for our first request"
        self.start = found.start
        self.heard: list[Message] = []

    def tell(self, op: str, **more: object) -> None:
        """Ask for something."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was killed
            self.control.send(json.dumps({"op": op, **more}).encode())

    def hear(self, op: str, role: str | None = None, within: float = PATIENCE) -> Message | None:
        """Wait for a message. Returns None when it does not come in time, or nobody can send it any more."""
        end = time.monotonic() + within
        seen = 0
        while True:
            for message in self.heard[seen:]:
                if message["op"] == op and role in (None, message.get("role")):
                    return message
            seen = len(self.heard)
            if not select.select([self.control], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            try:
                data = self.control.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self.heard.append(json.loads(data))

    def send(self, number: int) -> bool:
        """Signal it."""
        return send(self.pid, self.start, number)

    def is_alive(self) -> bool:
        """Whether it is."""
        found = sight(self.pid)
        return found is not None and found.start == self.start and found.alive

    def descriptors(self) -> Counter[str]:
        """What it has open, by kind."""
        kinds: Counter[str] = Counter()
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                kinds[os.readlink(f"/proc/{self.pid}/fd/{name}").partition("[")[0]] += 1
        return kinds


class Arena:
    """Where trials take place: a directory, and the maker of supervising processes.

    Args:
        tier: the setting `containment`.
        user: who the supervising processes run as; default ourselves.
    """

    def __init__(self, tier: str, user: str | None = None) -> None:
        self.tier = tier
        self.checked = False
        self._user = _entry(user)
        self.directory = Path(tempfile.mkdtemp(prefix="supervise-chaos-"))
        self._own(self.directory)
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._maker = self._start(theirs)

    def _start(self, control: socket.socket) -> subprocess.Popen[bytes]:
        project = Path(__file__).resolve().parents[1]
        packages = Path(inspect.getfile(trio)).resolve().parents[1]
        env = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": f"{project}{os.pathsep}{packages}"}
        options: dict[str, Any] = {"env": {**env, "HOME": str(self.directory), "PYTHONDONTWRITEBYTECODE": "1"}}
        if self._user is not None:
            options |= {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        options |= {"cwd": self.directory, "pass_fds": (control.fileno(),)}
        return subprocess.Popen(
            [self._python(options), "-m", "benchmarks.chaos_supervisor", str(control.fileno())], **options
        )

    def _python(self, options: dict[str, Any]) -> str:
        """Ours, or where the other user may not run it, one of the same version on the default path."""
        if self._user is None:
            return sys.executable
        other = shutil.which(f"python{sys.version_info[0]}.{sys.version_info[1]}", path=os.defpath)
        for python in filter(None, (sys.executable, other)):
            try:
                subprocess.run(
                    [python, "-c", "import benchmarks.chaos_supervisor"], check=True, capture_output=True, **options
                )
            except (PermissionError, subprocess.CalledProcessError):
                continue
            return python
        raise SystemExit(f"the user {self._user.pw_name!r} cannot run our Python with the project and its packages")

    def _own(self, path: Path) -> None:
        if self._user is not None:
            os.chown(path, self._user.pw_uid, self._user.pw_gid)

    def make_directory(self, number: int) -> Path:
        """A new one for a trial."""
        directory = Path(tempfile.mkdtemp(prefix=f"trial-{number}-", dir=self.directory))
        (directory / "workspace").mkdir()
        for path in (directory, directory / "workspace"):
            self._own(path)
        return directory

    def supervisor(self, directory: Path, finder: Finder, token: str) -> SupervisingProcess:
        """A new supervising process."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        order = {"directory": str(directory), "token": token, "tier": self.tier}
        with self._lock, theirs:
            socket.send_fds(self._control, [json.dumps(order).encode()], [theirs.fileno()])
            answer = self._control.recv(65536)
        if not answer:
            raise RuntimeError("the maker of supervising processes has ended")
        return SupervisingProcess(json.loads(answer)["pid"], ours, finder)

    def close(self) -> None:
        """The maker ends, and the directory goes."""
        self._control.close()
        self._maker.wait()
        shutil.rmtree(self.directory)


def _entry(user: str | None) -> pwd.struct_passwd | None:
    if user is None:
        return None
    if os.geteuid() != 0:
        raise SystemExit(f"--user {user} needs root, which this is not: run it as that user, without --user")
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise SystemExit(f"--user {user}: there is no such user") from None


# --- one trial ---------------------------------------------------------------------------------------------


class Trial:
    """Runs one plan."""

    def __init__(self, arena: Arena, plan: Plan) -> None:
        self.arena = arena
        self.plan = plan
        self.verdict = Verdict(plan)
        self.directory = arena.make_directory(plan.number)
        token = f"chaos-{secrets.token_hex(8)}"
        self.finder = Finder(self.directory, token, now_in_ticks())
        self.sup = arena.supervisor(self.directory, self.finder, token)
        self._token = token
        self._cgroups: set[Path] = set()
        self._cancelled = False

    def run(self) -> Verdict:
        """The whole trial. Whoever is left in the end is ended."""
        try:
            self._run()
            self.verdict.helpers = len(self.finder.helpers)
            if not self.verdict.good:
                self.verdict.log = (self.directory / "log").read_text(errors="replace")[-2000:]
        finally:
            self.sup.control.close()
            self.sup.send(signal.SIGKILL)
            self.finder.end_all()
            for group in self._cgroups:
                _remove_group(group)
            shutil.rmtree(self.directory)
        return self.verdict

    def _run(self) -> None:
        sup, plan, verdict = self.sup, self.plan, self.verdict
        sup.hear("here")
        before = sup.descriptors()
        sup.tell("open")
        ready = sup.hear("ready")
        if ready is None:
            verdict.leftovers["trouble"] = "no supervisor was opened"
            return
        verdict.tier = ready["tier"]
        if plan.twice:
            self._job(agent={"children": [], "leader": [], "life": 0}, watch={"children": [], "leader": []})
            sup.hear("done")
            sup.heard.clear()
            between = sup.descriptors()
        self._job(agent=plan.agent, watch=plan.watch)
        self._until_phase()
        time.sleep(plan.delay)
        verdict.struck = plan.victim == "none" or self._strike()
        began = time.monotonic()
        self._note()
        if not sup.is_alive() or (plan.victim in ("supervisor", "all") and plan.signal is not signal.SIGSTOP):
            self._after_the_end(began)
            return
        done = self._after_a_job(began)
        if done and plan.twice and not (plan.victim in ("zygote", "both") and verdict.struck):
            self._compare("descriptors of a job", between)
        self._leave(before)

    def _job(self, agent: Message, watch: Message) -> None:
        self.sup.tell("job", agent=agent, watch=watch)

    def _until_phase(self) -> None:
        match self.plan.phase:
            case "before":
                return
            case "watch":
                self.sup.hear("ProcessStarted", "watch")
            case "agent":
                self.sup.hear("ProcessStarted", "agent")
            case "teardown":
                self.sup.hear("ProcessStarted", "agent")
                time.sleep(self.plan.pause)
                self._cancel()
            case "end":
                self.sup.hear("ProcessExited", "agent")

    def _cancel(self) -> None:
        self._cancelled = True
        self.sup.tell("cancel")

    def _note(self) -> tuple[list[Sight], list[Sight]]:
        """Remember what will be hard to find when the supervising process is dead."""
        for owner in self.directory.glob("state/run/*/owner.json"):
            with contextlib.suppress(FileNotFoundError):
                group = json.loads(owner.read_bytes()).get("cgroup")
                if group is not None:
                    self._cgroups.add(Path(group))
        self.finder.listen()
        return self.finder.note_helpers(self.sup.pid)

    # --- the kill

    def _strike(self) -> bool:
        """Signal the victim. Returns whether there was one."""
        end = time.monotonic() + 0.3
        while not (targets := self._targets()) and time.monotonic() < end and self.sup.is_alive():
            time.sleep(0.005)
        if self.plan.victim in ("both", "all"):  # at once: none may see the other die
            for pid, start in targets:
                send(pid, start, signal.SIGSTOP)
        there = [send(pid, start, self.plan.signal) for pid, start in targets]
        return bool(there) and all(there)

    def _targets(self) -> list[tuple[int, int]]:
        zygotes, guardians = self._note()
        supervisor = (self.sup.pid, self.sup.start)
        helpers = [(each.pid, each.start) for each in (*zygotes, *guardians)]
        match self.plan.victim:
            case "supervisor":
                return [supervisor]
            case "zygote":
                return [(each.pid, each.start) for each in zygotes[:1]]
            case "guardian":
                return [(each.pid, each.start) for each in guardians[int(self.plan.which * len(guardians)) :][:1]]
            case "both":
                return helpers if guardians else []
            case "all":
                return [supervisor, *helpers] if guardians or self.arena.tier == "process-group" else [supervisor]
        return self.finder.roles.get(self.plan.victim, [])[-1:]

    # --- the supervising process is dead

    def _after_the_end(self, began: float) -> None:
        plan, verdict = self.plan, self.verdict
        unowned = plan.victim == "all" or verdict.tier == "process group"
        verdict.bound = NOBODY_ENDS_THEM if unowned else ORPHANS_GONE
        self._until_empty(began)
        if not verdict.survivors:
            self._count_groups("cgroup before the sweep", gone=not unowned)
        heir = self.arena.supervisor(self.directory, self.finder, self._token)
        try:
            heir.tell("open")
            swept = heir.hear("ready")
            if swept is None:
                verdict.leftovers["trouble"] = f"no second supervisor was opened; it is alive: {heir.is_alive()}"
                return
            verdict.found = len(swept["found"])
            heir.tell("leave")
            heir.hear("left")
            heir.tell("bye")
        finally:
            heir.control.close()
        if self.finder.empty_after(time.monotonic(), 0.3) is None:
            verdict.unswept = self._told(self.finder.alive())
        self._count_records()
        self._count_groups("cgroup")

    # --- the supervising process lives

    def _after_a_job(self, began: float) -> bool:
        """Let the job end, and look who has outlived it. Returns whether it has ended."""
        plan, verdict, sup = self.plan, self.verdict, self.sup
        verdict.bound = JOB_GONE + UNENDED * (plan.victim == "both" or verdict.tier == "process group")
        if plan.victim == "supervisor":  # stopped
            time.sleep(plan.pause)
            sup.send(signal.SIGCONT)
        elif plan.victim != "none":
            verdict.bound += STOPPED * (plan.signal is signal.SIGSTOP)
            time.sleep(plan.pause)
        if plan.phase != "end" and not self._cancelled:
            self._cancel()
            began = time.monotonic()
        elif plan.victim == "supervisor":
            began = time.monotonic()
        done = sup.hear("done", within=max(0.0, began + verdict.bound - time.monotonic()))
        if done is None:
            verdict.leftovers["job"] = f"it had not ended after {verdict.bound:.1f} s"
            verdict.survivors = self._told(self.finder.alive(helpers=False))
            return False
        verdict.survivors = self._told(self.finder.alive(helpers=False))
        if self.finder.locked() and not verdict.survivors:
            verdict.survivors = ["somebody who has the lock, and is faster than any look"]
        if not verdict.survivors:
            verdict.seconds = done["time"] - began
        if done["survivors"]:
            verdict.leftovers["told survivors"] = "; ".join(done["survivors"])
        return True

    def _leave(self, before: Counter[str]) -> None:
        sup, verdict = self.sup, self.verdict
        sup.tell("leave")
        if sup.hear("left") is None:
            verdict.leftovers["trouble"] = "the supervisor was not left"
            return
        if not verdict.survivors:
            self._until_empty(time.monotonic(), 1.0)
        elif self.finder.empty_after(time.monotonic(), NOBODY_ENDS_THEM) is None:
            verdict.unswept = self._told(self.finder.alive())
        self._compare("descriptors", before)
        if "Traceback" in (self.directory / "log").read_text(errors="replace"):
            verdict.leftovers["traceback"] = "a bug of the library's, or of its helpers'"
        self._count_records()
        self._count_groups("cgroup")
        sup.tell("bye")

    # --- counting

    def _until_empty(self, began: float, bound: float | None = None) -> None:
        seconds = self.finder.empty_after(began, self.verdict.bound if bound is None else bound)
        if seconds is None:
            alive = self.finder.alive()
            self.verdict.survivors = self._told(alive) or ["somebody who has the lock, and is faster than any look"]
            self.verdict.seconds = None
        elif bound is None:
            self.verdict.seconds = seconds

    def _told(self, alive: list[Sight]) -> list[str]:
        return [each.told() for each in alive]

    def _compare(self, kind: str, before: Counter[str]) -> None:
        now = self.sup.descriptors()
        if more := now - before:
            self.verdict.leftovers[kind] = ", ".join(f"{count} {name}" for name, count in more.items())

    def _count_records(self) -> None:
        if left := [path.name for path in self.directory.glob("state/run/*")]:
            self.verdict.leftovers["record"] = ", ".join(left)

    def _count_groups(self, kind: str, *, gone: bool = True) -> None:
        if left := [path.name for path in self._cgroups if gone and path.exists()]:
            self.verdict.leftovers[kind] = ", ".join(left)


def _remove_group(path: Path) -> None:
    for directory, _, _ in sorted(os.walk(path), reverse=True):
        with contextlib.suppress(OSError):  # it is told as a leftover already
            os.rmdir(directory)


# --- the referee is tested first ---------------------------------------------------------------------------


#: How long the referee may look for what it has hidden, in seconds.
HIDING = 1.0

#: What is hidden, by the witness that must find it.
HIDDEN = {
    "scan": ["setsid", "daemon", "noenv", "close"],
    "known": ["setsid", "daemon", "close", "foreign"],
    "locked": ["setsid", "daemon", "hop"],
}


def check_referee(arena: Arena, finder_class: type[Finder] = Finder) -> None:
    """Hide processes outside of any supervisor, and find them.

    Args:
        arena: gives the directories.
        finder_class: who looks for them.

    Raises:
        NotFoundError: one was not found.
    """
    for witness, flags in HIDDEN.items():
        directory = arena.make_directory(0)
        token = f"chaos-{secrets.token_hex(8)}"
        since = now_in_ticks()
        finder = finder_class(directory, token, since)
        plan = json.dumps({"children": [flags], "leader": [], "life": 0.0})
        words = [sys.executable, "-I", "-S", chaos_children.__file__, token, str(directory), "agent", plan]
        try:
            subprocess.run(words, env={}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
            end = time.monotonic() + HIDING
            while not (seen := getattr(finder, witness)()) and time.monotonic() < end:
                time.sleep(LOOK)  # it forks, and executes itself anew: a look may miss that
            if not seen or finder.empty_after(time.monotonic(), 0.0) is not None:
                raise NotFoundError(f"the referee ({witness}) did not find a process of its own that does {flags}")
            finder.end_all()
            if finder.empty_after(time.monotonic(), 1.0) is None:
                raise NotFoundError(f"the referee finds {finder.alive()}, which it has ended")
        finally:
            Finder(directory, token, since).end_all()
            shutil.rmtree(directory)


# --- many trials -------------------------------------------------------------------------------------------


def run_trials(plans: list[Plan], arena: Arena, *, at_once: int = 3, told: Callable[[Verdict], None]) -> list[Verdict]:
    """Run them, some at once. Returns the verdicts in the order of the plans.

    Args:
        plans: of `plan_trial`.
        arena: where. Its first run begins with the check of the referee.
        at_once: how many at a time.
        told: called with each verdict, as they come.
    """
    if not arena.checked:
        check_referee(arena)
        arena.checked = True

    def run(plan: Plan) -> Verdict:
        try:
            verdict = Trial(arena, plan).run()
        except Exception as error:  # a bug of the referee's is told, and must not cost the other trials
            verdict = Verdict(plan, leftovers={"trouble": f"{type(error).__name__}: {error}"})
            verdict.log = traceback.format_exc()
        told(verdict)
        return verdict

    with ThreadPoolExecutor(at_once) as pool:
        verdicts = list(pool.map(run, plans))
    owned = [each for each in verdicts if each.tier != "process group" and each.plan.phase != "before"]
    if owned and not any(each.helpers for each in owned):
        raise NotFoundError("the referee has seen no guardian and no zygote in any trial")
    return verdicts


def summary(verdicts: list[Verdict]) -> Message:
    """The numbers of a run."""
    rows = []
    for tier, victim in sorted({(each.tier, each.plan.strike) for each in verdicts}):
        group = [each for each in verdicts if (each.tier, each.plan.strike) == (tier, victim)]
        seconds = sorted(each.seconds for each in group if each.seconds is not None)
        rows.append(
            {
                "tier": tier,
                "victim": victim,
                "trials": len(group),
                "struck": sum(each.struck for each in group),
                "with_survivors": sum(bool(each.survivors) for each in group),
                "survivors": sum(len(each.survivors) for each in group),
                "swept": sum(each.found for each in group),
                "after_sweep": sum(len(each.unswept) for each in group),
                "leftovers": dict(Counter(kind for each in group for kind in each.leftovers)),
                "p50": _quantile(seconds, 0.5),
                "p99": _quantile(seconds, 0.99),
                "max": seconds[-1] if seconds else None,
            }
        )
    return {
        "trials": len(verdicts),
        "survivors": sum(len(each.survivors) for each in verdicts),
        "after_sweep": sum(len(each.unswept) for each in verdicts),
        "leftovers": dict(Counter(kind for each in verdicts for kind in each.leftovers)),
        "rows": rows,
    }


def _quantile(seconds: list[float], share: float) -> float | None:
    if len(seconds) < 2:
        return seconds[0] if seconds else None
    return statistics.quantiles(seconds, n=100, method="inclusive")[round(share * 100) - 1]


def table(numbers: Message) -> Iterator[str]:
    """The summary as a table."""
    head = ("tier", "victim", "trials", "struck", "survivors", "swept", "after sweep", "p50", "p99", "max", "leftovers")
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in numbers["rows"]:
        times = ["-" if row[name] is None else f"{row[name]:.2f} s" for name in ("p50", "p99", "max")]
        left = ", ".join(f"{count} {kind}" for kind, count in row["leftovers"].items()) or "none"
        names = ("tier", "victim", "trials", "struck", "survivors", "swept", "after_sweep")
        cells = [*(str(row[name]) for name in names), *times, left]
        yield "| " + " | ".join(cells) + " |"


def complaint(verdict: Verdict, command: str) -> str:
    """What is wrong with a trial, and how to repeat it."""
    lines = [verdict.plan.told(), f"  repeat: {command} --trial {verdict.plan.number}"]
    for kind, told in (("survivor", verdict.survivors), ("after the sweep", verdict.unswept)):
        lines += [f"  {kind}: {each}" for each in told[:TOLD]]
        lines += [f"  … and {len(told) - TOLD} more"] * (len(told) > TOLD)
    lines += [f"  left: {kind}: {what}" for kind, what in verdict.leftovers.items()]
    lines += [f"  log: {line}" for line in verdict.log.splitlines()]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description="Kill what supervises.")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tier", choices=TIERS, default="auto")
    parser.add_argument("--user", help="who supervises (needs root)")
    parser.add_argument("--only", choices=VICTIMS, help="who is killed, in every trial")
    parser.add_argument("--trial", type=int, help="run this one alone")
    parser.add_argument("--at-once", type=int, default=3, help="trials at a time")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(words)
    numbers = range(options.trials) if options.trial is None else [options.trial]
    plans = [plan_trial(options.seed, number, options.tier, options.only) for number in numbers]
    command = f"python -m benchmarks.chaos --seed {options.seed} --tier {options.tier}"
    command += f" --user {options.user}" * (options.user is not None) + f" --only {options.only}" * bool(options.only)

    def told(verdict: Verdict) -> None:
        if not verdict.good:
            print(complaint(verdict, command), file=sys.stderr, flush=True)
        elif options.trial is not None:
            print(f"{verdict.plan.told()}: {verdict.seconds or 0:.3f} s", file=sys.stderr, flush=True)

    try:
        with contextlib.closing(Arena(options.tier, options.user)) as arena:
            verdicts = run_trials(plans, arena, at_once=options.at_once, told=told)
    except NotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    found = summary(verdicts)
    if options.json:
        bad = [dataclasses.asdict(each) for each in verdicts if not each.good]
        print(json.dumps({**found, "seed": options.seed, "bad": bad}, default=str))
    else:
        print("\n".join(table(found)))
    return int(any(not each.good for each in verdicts))


if __name__ == "__main__":
    sys.exit(main())
