"""Sixty trials of the chaos harness, and the proof that it finds what is left. More: `python -m benchmarks.chaos`."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from benchmarks import chaos
from benchmarks.chaos import Arena, NotFoundError, Plan, Verdict, check_referee, plan_trial, run_trials
from benchmarks.chaos_finder import Finder
from supervise.processes.tiers import open_containments
from supervise.settings import Settings

SEED = 2
TRIALS = 30  # of each tier


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    with closing(Arena("guardian")) as arena:
        yield arena


def judged(plans: list[Plan], arena: Arena) -> list[Verdict]:
    """The verdicts, of which the bad ones are told with the command that repeats them."""
    command = f"python -m benchmarks.chaos --seed {SEED} --tier {arena.tier}"
    bad: list[str] = []

    def told(verdict: Verdict) -> None:
        if not verdict.good:
            bad.append(chaos.complaint(verdict, command))

    verdicts = run_trials(plans, arena, at_once=6, told=told)
    print("\n".join(bad))
    return verdicts


def plans(tier: str, numbers: range, only: str | None = None) -> list[Plan]:
    return [plan_trial(SEED, number, tier, only) for number in numbers]


def test_who_supervises_may_die_at_any_moment_and_guardians_leave_nobody(arena: Arena) -> None:
    verdicts = judged(plans("guardian", range(TRIALS)), arena)
    assert {each.tier for each in verdicts} == {"guardian"}
    assert [each.plan.number for each in verdicts if not each.good] == []
    assert sum(each.struck for each in verdicts) > TRIALS // 2


async def why_no_cgroup(state_dir: Path) -> str:
    async with open_containments(Settings(state_dir=state_dir)) as containments:
        return "" if containments.tier == "guardian and cgroup" else "; ".join(containments.notes)


def test_who_supervises_may_die_at_any_moment_and_neither_process_nor_cgroup_is_left(tmp_path: Path) -> None:
    notes = trio.run(why_no_cgroup, tmp_path)
    if notes:
        pytest.skip(f"no cgroup here: {notes}")
    with closing(Arena("cgroup")) as arena:
        verdicts = judged(plans("cgroup", range(TRIALS, 2 * TRIALS)), arena)
    assert {each.tier for each in verdicts} == {"guardian and cgroup"}
    assert [each.plan.number for each in verdicts if not each.good] == []


QUIET = {"children": [], "leader": []}


def special(**changes: Any) -> Plan:
    """A trial in which little is left to chance."""
    plan = plan_trial(SEED, 0, "guardian", None)
    quiet = {"phase": "agent", "delay": 0.05, "pause": 0.0, "agent": {**QUIET, "life": None}, "watch": QUIET}
    return replace(plan, **{**quiet, **changes})


def test_a_stopped_guardian_goes_on_also_if_it_has_nothing_to_do(arena: Arena) -> None:
    """The last one has no tree yet, so that nobody asks anything of it."""
    stops = [
        special(number=n, victim="guardian", signal=signal.SIGSTOP, which=w) for n, w in enumerate((0.0, 0.5, 0.99))
    ]
    verdicts = judged(stops, arena)
    assert all(each.struck and each.good for each in verdicts)


def test_a_leader_that_asks_to_be_traced_does_not_bring_down_its_guardian(arena: Arena) -> None:
    """Its parent is told of its stops then, as of an end."""
    traced = special(victim="none", delay=1.0, agent={"children": [], "leader": ["traced"], "life": None})
    (verdict,) = judged([traced], arena)
    assert verdict.good


def test_a_supervisor_killed_on_a_bare_process_group_is_seen_to_leave_its_tree() -> None:
    """The proof that the trials above could fail."""
    ones = [each for each in plans("process-group", range(40), "supervisor") if each.phase == "agent"]
    killed = [each for each in ones if each.signal.name == "SIGKILL"][:2]
    with closing(Arena("process-group")) as arena:
        verdicts = run_trials(killed, arena, told=lambda verdict: None)
    assert killed
    assert all(verdict.survivors for verdict in verdicts)
    assert all(verdict.found for verdict in verdicts), "the next supervisor's sweep ends what it finds"
    assert not any("record" in verdict.leftovers for verdict in verdicts)


@pytest.mark.parametrize("witness", ["scan", "known", "locked"])
def test_a_referee_that_has_lost_one_of_its_eyes_says_so(witness: str, arena: Arena) -> None:
    blind = type("Blind", (Finder,), {witness: lambda self: []})
    with pytest.raises(NotFoundError, match=witness):
        check_referee(arena, blind)


def test_another_user_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="needs root"):
        Arena("guardian", "nobody")


def test_a_run_that_leaves_somebody_ends_with_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = (each.number for each in plans("process-group", range(40), "supervisor") if each.phase == "agent")
    trial = next(
        each for each in numbers if plan_trial(SEED, each, "process-group", "supervisor").signal.name == "SIGKILL"
    )
    words = ["--seed", str(SEED), "--tier", "process-group", "--only", "supervisor", "--trial", str(trial), "--json"]
    assert chaos.main(words) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["survivors"] > 0
    assert f"--trial {trial}" in err
