"""`supervise worker` as a user has it: a process that takes tasks, that signals end, and that leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import WITHOUT_RIGHTS, Done, Root, Running, refused

ESCAPE = "\x1b"


def stop(worker: Running, number: int = signal.SIGTERM) -> Done:
    """The first signal, and the end."""
    worker.process.send_signal(number)
    return worker.end()


def stop_twice(root: Root, worker: Running, name: str = "w1", number: int = signal.SIGTERM) -> Done:
    """The first signal, and when that was heard, the second."""
    worker.process.send_signal(number)
    root.until(lambda: root.beat(name)["status"] == "draining", "a draining worker")
    return stop(worker, number)


def hanging(root: Root, name: str, *steps: str) -> None:
    """A task under way that ends of nothing but a signal."""
    root.drop("t1", *steps, "text hanging", "hang", worker=name)
    root.until(lambda: root.is_at_work("t1", "hanging", worker=name), "an agent at work")


def put_back(root: Root, name: str = "w1") -> bytes:
    """The task that waits again, the only one; it may have another name."""
    (path,) = (root.path / "tasks" / name).iterdir()
    assert path.name in ("t1.json", "t1~retry.json")
    return path.read_bytes()


def nothing_is_left(root: Root, name: str = "w1") -> None:
    assert f"{name}.lock" not in os.listdir(root.path / "locks")
    assert [each for kind in ("tasks", "running") for each in root.names(kind, name) if each.startswith(".")] == []
    assert root.names("running", name) == []
    beat = root.beat(name)
    assert (beat["stopped"], beat["active_tasks"]) == (True, [])
    jobs = [pid for pid in root.cli.alive() if b"task_agent" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert jobs == []


# --- the life of a worker ------------------------------------------------------------------------------------


def test_a_signal_drains_a_worker_that_then_leaves_results_and_nothing_else(root: Root) -> None:
    numbers = {"w1": signal.SIGTERM, "w2": signal.SIGINT}
    workers = {name: root.start("worker", name, "--json") for name in numbers}
    for name, worker in workers.items():
        root.ready(worker, name)
        root.drop("t1", "text hello", "error careful", "wait gate", "done all is well", worker=name, priority="high")
        root.until(lambda: root.is_at_work("t1", "hello", worker=name), "an agent at work")  # noqa: B023  # at once
        assert json.loads((root.path / f"triggers/{name}/t1.trigger").read_bytes())["status"] == "received"
        worker.process.send_signal(numbers[name])
        root.until(lambda: root.beat(name)["status"] == "draining", "a draining worker")  # noqa: B023  # at once
        root.drop("t2", "done too late", worker=name)
    root.go("gate")
    for name, worker in workers.items():
        done = worker.end()
        assert (done.code, done.err.count("\n")) == (0, 1), done.err
        assert f"worker {name} takes tasks from {root.path}/tasks/{name}" in done.err
        assert ESCAPE not in done.out + done.err
        result = root.result("t1", name)
        assert (result["status"], result["exit_code"], result["attempt"]) == ("completed", 0, 1)
        assert (result["text"], result["stderr"], result["cost_usd"]) == ("all is well", "careful\n", 0.25)
        told = [line["type"] for line in done.lines if line.get("task_id") == "t1"]
        assert told == ["task_received", "task_claimed", "task_finished"]
        statuses = {line["status"] for line in done.lines if line["type"] == "worker"}
        assert statuses == {"degraded", "healthy", "draining"}
        assert root.names("tasks", name) == ["t2.json"]
        nothing_is_left(root, name)


def test_a_second_signal_cancels_what_runs_and_puts_it_back(root: Root) -> None:
    ends = {"w1": (signal.SIGTERM, 143), "w2": (signal.SIGINT, 130)}
    workers = {name: root.start("worker", name, "--json") for name in ends}
    for name, worker in workers.items():
        root.ready(worker, name)
        hanging(root, name)
        before = root.files()[f"running/{name}/t1.json"]
        number, code = ends[name]
        done = stop_twice(root, worker, name, number)
        assert done.code == code, done.err
        assert put_back(root, name) == before
        assert [line["reason"] for line in done.lines if line["type"] == "task_put_back"] == ["the worker ends"]
        nothing_is_left(root, name)


def test_a_third_signal_does_not_wait_for_an_agent_that_is_deaf(root: Root) -> None:
    worker = root.worker(env={"SUPERVISE_AGENT__TERMINATION_TIMEOUT": "25"})
    hanging(root, "w1", "deaf")
    worker.process.send_signal(signal.SIGTERM)
    root.until(lambda: root.beat()["status"] == "draining", "a draining worker")
    worker.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        worker.process.wait(0.5)
    assert stop(worker).code == 143
    assert time.monotonic() - began < 15
    assert put_back(root)
    nothing_is_left(root)


def test_a_drain_that_takes_too_long_puts_its_task_back_and_is_a_failure(root: Root) -> None:
    worker = root.worker("w1", "--drain-timeout", "0.3")
    hanging(root, "w1")
    done = stop(worker)
    assert done.code == 1
    assert "the drain timeout is over" in done.err
    assert put_back(root)
    nothing_is_left(root)


def test_a_pending_retry_outlives_the_worker(root: Root) -> None:
    worker = root.worker(env={"SUPERVISE_WORKER__BACKOFF_BASE": "3"})
    root.drop("t1", "first it went wrong", "done well now")
    worker.line_with('"task_retried"')
    assert stop(worker).code == 0
    assert root.names("tasks") == ["t1~retry.json"]
    worker = root.worker()
    result = root.result("t1")
    assert (result["text"], result["attempt"], result["retry_count"]) == ("well now", 2, 1)
    assert stop(worker).code == 0
    nothing_is_left(root)


def test_a_killed_worker_leaves_no_process_and_the_next_one_takes_its_task_up_again(root: Root) -> None:
    worker = root.worker()
    hanging(root, "w1", "deaf")
    assert len(root.cli.alive()) > 1
    worker.process.kill()
    root.until(lambda: not root.cli.alive(), "an end of the orphans", seconds=0.3 + 2)
    assert worker.end().code == -signal.SIGKILL
    assert root.names("running") == ["t1.json"]
    again = root.worker()
    root.until(lambda: root.is_at_work("t1", "hanging", attempt=2), "a second attempt")
    assert stop_twice(root, again).code == 143
    state = json.loads((root.path / "tasks/w1/t1~retry.json").read_bytes())["_supervise"]
    assert [(each["attempt"], each["failure_kind"]) for each in state["attempts"]] == [(1, "killed")]
    nothing_is_left(root)


# --- one at a time -------------------------------------------------------------------------------------------


def test_a_second_instance_is_refused_or_waits(root: Root) -> None:
    first = root.worker()
    refused, waits, given_up, other = (
        root.start("worker", "w1"),
        root.start("worker", "w1", "--json", "--lock-timeout", "30"),
        root.start("worker", "w1", "--lock-timeout", "0.2"),
        root.worker("w2"),
    )
    for done in (refused.end(), given_up.end()):
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith(f"supervise: already running (PID {first.process.pid}): ")
        assert done.err.count("\n") == 1
    assert root.beat()["pid"] == first.process.pid
    assert waits.process.poll() is None
    assert stop(first).code == 0
    root.until(lambda: root.beat()["pid"] == waits.process.pid and root.beat()["status"] == "healthy", "the next")
    for worker in (waits, other):
        assert stop(worker).code == 0


def test_a_signal_ends_the_wait_for_the_lock(root: Root) -> None:
    first = root.worker()
    lock = root.path / "locks/w1.lock"
    waits = root.start("worker", "w1", "--lock-timeout", "30", "--json")
    root.until(lambda: _has_open(waits.process.pid, lock), "somebody who tries the lock")
    done = stop(waits)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert lock.read_text().startswith(f"{first.process.pid}\n")
    assert stop(first).code == 0


def _has_open(pid: int, path: Path) -> bool:
    """Whether it is caught with the file open: it tries the lock again and again."""
    try:
        links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    except FileNotFoundError:  # closed meanwhile
        return False
    return str(path) in links


def test_a_lock_file_is_a_pid_file_for_shells(root: Root, tmp_path: Path) -> None:
    file = tmp_path / "w1.pid"
    dead = subprocess.Popen(["true"])
    dead.wait()
    file.write_text(f"{dead.pid}\n")
    worker = root.worker("w1", "--lock-file", str(file))
    assert file.read_text() == f"{worker.process.pid}\n"
    subprocess.run(["sh", "-c", f'kill -0 "$(cat {file})"'], check=True)
    elsewhere = root.do("worker", "w1", "--root", str(tmp_path / "elsewhere"), "--lock-file", str(file))
    assert elsewhere.code == 1
    assert f"already running (PID {worker.process.pid})" in elsewhere.err
    subprocess.run(["sh", "-c", f'kill "$(cat {file})"'], check=True)
    assert worker.end().code == 0
    assert not file.exists()
    with subprocess.Popen(["sleep", "30"]) as stranger:
        file.write_text(f"{stranger.pid}\n")
        refused = root.do("worker", "w1", "--lock-file", str(file))
        stranger.kill()
    assert refused.code == 1
    assert f"already running (PID {stranger.pid}): {file} is not locked" in refused.err
    assert file.read_text() == f"{stranger.pid}\n"
    assert os.listdir(root.path / "locks") == []


# --- what it tells -------------------------------------------------------------------------------------------


def test_a_reader_who_goes_away_or_takes_nothing_keeps_no_task_from_its_work(root: Root) -> None:
    gone = root.worker("w1")
    assert gone.process.stdout is not None
    gone.line_with('"worker"')
    gone.process.stdout.close()
    for number in range(3):
        root.drop(f"t{number}", f"done {number}")
    for number in range(3):
        assert root.result(f"t{number}")["text"] == str(number)
    gone.process.send_signal(signal.SIGTERM)
    assert gone.process.wait(20) == 0
    assert gone.process.stderr is not None
    _, lost = gone.process.stderr.read().splitlines()
    assert lost.endswith(b"its reader has gone away; the worker goes on without it")
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with open(reading, "rb") as slow:
        try:
            worker = root.start("worker", "w1", "--json", "--executor", "mock", stdout=writing)
        finally:
            os.close(writing)
        root.until(lambda: root.beat().get("pid") == worker.process.pid and root.beat()["status"] == "healthy")
        for number in range(60):
            root.drop(f"m{number}", "x")
        root.until(lambda: len(root.names("results")) == 63, "results of all")
        worker.process.send_signal(signal.SIGTERM)
        root.until(lambda: root.beat()["status"] == "draining", "a draining worker")
        lines = [json.loads(line) for line in slow]  # now it reads: nothing that was kept for it is lost
    assert worker.process.wait(20) == 0
    assert sum(line["type"] == "task_finished" for line in lines) == 60
    assert lines[-1]["status"] == "draining"


def test_without_json_events_are_lines_on_standard_error(root: Root) -> None:
    worker = root.start("worker", "w1", "--metrics-port", "0")
    root.until(lambda: root.beat().get("status") == "healthy", "a worker that is ready")
    root.drop("t1", "first it [/went] wrong\x1b[2J", "done")
    root.result("t1")
    root.drop("t2", "fail for good", max_attempts=1)
    root.letter("t2")
    done = stop(worker)
    assert (done.code, done.out) == (0, "")
    assert ESCAPE not in done.err
    for words in (
        "supervise: metrics at http://127.0.0.1:",
        "supervise: worker w1 takes tasks from ",
        "t1               received\n",
        "t1               attempt 1 begins\n",
        "t1               attempt 1 failed (agent_error): ",
        "t1               attempt 2 begins\n",
        "t1               completed after 0.",
        " reported an error: it [/went] wrong [2J; once more at 2",
        "t2               is a dead letter (max_retries_exceeded): ",
        "w1               healthy: 0 tasks wait\n",
        "w1               draining",
    ):
        assert words in done.err, done.err
    assert "Traceback" not in done.err


def test_each_option_is_heeded(root: Root, tmp_path: Path) -> None:
    place, config, log = tmp_path / "place", tmp_path / "config.toml", tmp_path / "elsewhere"
    place.mkdir()
    config.write_text("[worker]\nmax_attempts = 1\n")
    words = ["--root", str(log), "--workspace", str(place), "--max-concurrent", "1", "--config", str(config)]
    root.path = log
    worker = root.worker("w9", *words, "--set", "worker.task_timeout=1")
    root.drop("t1", "write seen here", "wait gate", "done", worker="w9", timeout=20)
    root.drop("t2", "hang", worker="w9", priority="low")
    root.until((place / "seen").exists, "a file in the workspace")
    root.until(lambda: root.beat("w9")["queue_size"] == 1, "one that waits for its place")
    (place / "gate").touch()
    assert root.result("t1", "w9")["status"] == "completed"
    late = root.result("t2", "w9")
    assert (late["status"], late["exit_code"]) == ("timed_out", 124)
    assert late["duration_seconds"] < 8
    root.drop("t3", "fail at once", worker="w9")
    assert root.letter("t3", "w9")["retry_count"] == 0
    assert stop(worker).code == 0


def test_metrics_are_served_while_it_runs(root: Root) -> None:
    reading = root.start("worker", "w1", "--executor", "mock", "--metrics-port", "0", "--json")
    assert reading.process.stderr is not None
    line = reading.process.stderr.readline().decode()
    match = re.fullmatch(r"supervise: metrics at (http://127\.0\.0\.1:(\d+)/metrics)\n", line)
    assert match is not None, line
    root.until(lambda: root.beat().get("status") == "healthy", "a worker that is ready")
    root.drop("t1", "x")
    root.drop("bad id", "x")
    root.result("t1")
    root.letter("bad id")
    reading.line_with('"task_finished"')
    with urllib.request.urlopen(match[1], timeout=10) as answer:
        text = answer.read().decode()
    for sample in (
        'supervise_tasks_received_total{worker="w1"} 1.0',
        'supervise_tasks_total{status="completed",worker="w1"} 1.0',
        'supervise_dead_letters_total{reason="invalid_format",worker="w1"} 1.0',
        'supervise_attempts_total{outcome="completed",worker="w1"} 1.0',
        'supervise_attempt_seconds_count{worker="w1"} 1.0',
        'supervise_queue_size{worker="w1"} 0.0',
        'supervise_circuit_breaker_state{worker="w1"} 0.0',
        'supervise_worker_status{status="healthy",worker="w1"} 1.0',
        'supervise_worker_status{status="draining",worker="w1"} 0.0',
    ):
        assert f"{sample}\n" in text
    taken = root.do("worker", "w2", "--metrics-port", match[2])
    assert taken.code == 1
    assert re.fullmatch(
        rf"supervise: metrics cannot be served on 127\.0\.0\.1:{match[2]}: Address already in use; .*\n", taken.err
    )
    assert not (root.path / "tasks/w2").exists()
    assert stop(reading).code == 0
    with socket.socket() as free:  # nobody listens any more
        assert free.connect_ex(("127.0.0.1", int(match[2]))) != 0


# --- wrong use -----------------------------------------------------------------------------------------------


@pytest.fixture
def closed_place() -> Iterator[Path]:
    """A directory that nobody may write to, but for root with all its rights."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o555)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


def test_wrong_use_is_told_in_one_line(root: Root, tmp_path: Path, closed_place: Path) -> None:
    file, link, locks = tmp_path / "file", tmp_path / "link", tmp_path / "locks"
    file.write_text("mine\n")
    link.symlink_to(file)
    locks.mkdir()
    (locks / "locks").write_text("no directory\n")
    cases: list[tuple[list[str], int, str]] = [
        (["a/b"], 2, "the worker's name is 'a/b', but must match"),
        ([".."], 2, "the worker's name is '..', but must match"),
        ([], 2, "supervise worker needs NAME: the worker's name"),
        (["w1", "--set", "worker.rot=/x"], 2, "'worker.root'"),
        (["w1", "--set", "worker"], 2, "is no name=value"),
        (["w1", "--rot", "x"], 2, "--rot"),
        (["w1", "--root", str(file)], 1, f"{file}"),
        (["w1", "--root", str(file / "below")], 1, "cannot be used: Not a directory"),
        (["w1", "--root", str(locks)], 1, f"{locks}/locks cannot be used: File exists"),
        (["w1", "--lock-file", str(file)], 1, f"{file} is no lock file"),
        (["w1", "--lock-file", str(link)], 1, "is a symbolic link"),
        (["w1", "--lock-file", str(tmp_path / "no" / "pid")], 1, "is not there; make it"),
        (["w1", "--lock-timeout", "nan"], 2, "worker.lock_timeout"),
        (["w1", "--drain-timeout", "-1"], 2, "worker.drain_timeout"),
        (["w1", "--max-concurrent", "0"], 2, "worker.max_concurrent"),
        (["w1", "--max-concurrent", "many"], 2, "--max-concurrent"),
        (["w1", "--executor", "elsewhere"], 2, "--executor"),
        (["w1", "--set", "executor=redis"], 2, "executor is 'redis', which this version does not have"),
        (["w1", "--metrics-port", "70000"], 2, "worker.metrics_port"),
        (["w1", "--config", str(tmp_path / "no.toml")], 2, "no.toml"),
    ]
    dones = root.many([["worker", *words] for words, _, _ in cases])
    for done, (words, code, text) in zip(dones, cases, strict=True):
        refused(done, words, code, text)
    mine = closed_place / "root"
    bound = root.start("worker", "w1", "--root", str(mine), prefix=WITHOUT_RIGHTS)
    nowhere = root.cli.start("worker", "w1")
    refused(bound.end(), ["without rights"], 1, f"{mine} cannot be used: Permission denied")
    refused(nowhere.end(), ["no root"], 2, "a worker needs a root: set worker.root (SUPERVISE_WORKER__ROOT, --root)")
    assert file.read_text() == "mine\n"
    assert os.listdir(closed_place) == []
