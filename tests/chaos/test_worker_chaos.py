"""A worker that is killed, at random moments and at each of its calls: every task has one end. More of the former:
`python -m benchmarks.worker_chaos`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import worker_chaos
from supervise.dispatch.spool import Spool

LIMIT = 60.0  # seconds


@pytest.fixture
def root() -> Iterator[Path]:
    """In memory if that can be had: each task is on the disk several times before it has ended."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Path(path)


def told(module: str, *words: str) -> Any:
    """What a program of ours says. It forks, so it is no part of this process, which has threads."""
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, timeout=LIMIT, check=False)
    assert done.stdout, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_worker_may_be_killed_at_any_moment_and_each_task_has_one_end() -> None:
    found = told("benchmarks.worker_chaos", "--kills", "25", "--tasks", "300", "--seed", "7", "--json")
    assert found["wrong"] == []
    assert found["kills with a task under way"] >= 5
    assert found["attempts lost to a death"] >= 5


@pytest.mark.slow
@pytest.mark.parametrize(("end", "step"), [("finish", 2), ("retry", 2), ("bury", 3), ("release", 4)])
def test_death_at_any_call_of_a_tasks_life_leaves_it_one_end(root: Path, end: str, step: int) -> None:
    """And in what follows, once more, at half the way."""
    words = json.dumps({"what": "spools", "end": end, "step": step})
    lives = told("tests.chaos.worker_victim", os.fspath(root), words)
    assert len(lives) > 60 // step
    assert all(life["died"] for life in lives[:-1])
    assert sum(life["again"] for life in lives) > len(lives) // 2
    for life in lives:
        ends = (life["results"], [name for name in life["dlq"] if not name.startswith("bad")])
        assert sorted(ends) == [[], ["t.json"]], life
        assert [name for name in life["dlq"] if name.startswith("bad")] == ["bad.json", "bad.raw"], life
        assert life["tasks"] == life["running"] == [], life


@pytest.mark.slow
def test_death_at_any_call_of_a_whole_worker_leaves_each_task_one_end(root: Path) -> None:
    """A sample: a task that completes, one that does so when tried again, one that fails, and a file that is none."""
    words = json.dumps({"what": "workers", "numbers": [*range(3, 240, 20), 100_000]})
    lives = told("tests.chaos.worker_victim", os.fspath(root), words)
    assert sum(life["died"] for life in lives) > 6
    assert not lives[-1]["died"]
    for life in lives:
        assert not life["over"], life
        assert life["results"] == ["t0.json", "t1.json"], life
        assert life["dlq"] == ["bad.json", "bad.raw", "t2.json"], life
        assert life["tasks"] == life["running"] == [], life


def test_the_examiner_sees_what_is_lost_twice_left_and_made_up(tmp_path: Path) -> None:
    """The proof that the first test could fail."""
    spool = Spool(tmp_path, worker_chaos.WORKER)
    spool.create()
    journal = ["begun t0 1", "network t0 1", "begun t0 2", "completed t0 2", "begun t1 1", "auth t1 1", "begun t2 1"]
    (tmp_path / "journal").write_text("\n".join([*journal, "begun t2 1", "completed t2 1"]))
    result = {"task_id": "t0", "attempt": 2, "retry_count": 1, "status": "completed"}
    failed = {"attempt": 1, "failure_kind": "auth"}
    letter = {"task_id": "t1", "dlq_reason": "auth", "attempts": [failed]}

    def write(directory: Path, name: str, record: dict[str, Any]) -> None:
        (directory / name).write_text(json.dumps(record))

    write(spool.results, "t0.json", result)
    write(spool.dlq, "t1.json", letter)
    found, wrong = worker_chaos.examine(tmp_path, 2)
    assert [text for text in wrong if "t2" not in text] == []
    assert any("t2: attempts begun: [1, 1]" in text for text in wrong)
    assert found["attempts begun"] == 5
    write(spool.results, "t0.json", {**result, "attempt": 1, "retry_count": 1})
    write(spool.results, "t1.json", {**result, "task_id": "t1"})
    write(spool.running, "t9.json", {})
    (spool.dlq / ".t1.json.0123abcd").write_text("")
    _, wrong = worker_chaos.examine(tmp_path, 4)
    text = "\n".join(wrong)
    for words in ("twice: ['t1']", "lost: ['t2', 't3']", "running/w1/t9.json", ".0123abcd", "t0: retry_count"):
        assert words in text
    assert "t0: it has a result, but the job network" in text
