"""`supervise logs` as a user has it: what the agents have printed, before, while and after they do."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from supervise.cli.stdout import Stdout
from supervise.cli.tasks import Log
from supervise.dispatch.submit import job_id_of
from tests.cli.conftest import Cli, Root, refused
from tests.cli.test_worker_cli import stop, stop_twice


def test_logs_tell_of_all_attempts_while_they_run_and_afterwards(root: Root) -> None:
    worker = root.worker("w1", env={"SUPERVISE_WORKER__BACKOFF_BASE": "1.5"})
    root.drop("late", "x", not_before="2040-01-01T00:00:00Z")
    root.drop("t1", "text one", "error oh", "wait gate", "first wrong", "text two", "wait second", "done three")
    follows = root.start("logs", "t1", "--follow")
    assert b"one" in follows.line_with('"one"')
    errors = root.start("logs", "t1", "--follow", "--stderr")
    gone = root.start("logs", "t1", "--follow")
    gone.line_with('"one"')
    assert gone.process.stdout is not None
    gone.process.stdout.close()
    root.go("gate")
    assert b"wrong" in follows.line_with('"wrong"')
    assert follows.process.poll() is None  # the task has not ended, its attempt has
    follows.line_with('"two"')
    now = root.do("logs", "t1", "--root", str(root.path), "--worker", "w1")
    assert (now.code, now.out.count('"one"'), now.out.count('"two"'), now.out.count("three")) == (0, 2, 1, 0)
    interrupted = root.start("logs", "t1", "--follow")
    interrupted.line_with('"two"')
    interrupted.process.send_signal(signal.SIGINT)
    assert interrupted.end().code == 130
    root.go("second")
    follows.line_with("three")
    done = follows.end()
    assert (done.code, done.out) == (0, "")
    ids = [job_id_of("w1", "t1", n, root.path) for n in (1, 2)]
    attempts = [f"supervise: attempt {n} ({root.cli.state}/jobs/{ids[n - 1]})" for n in (1, 2)]
    assert done.err.splitlines() == attempts
    done = errors.end()
    assert (done.code, done.out) == (0, "oh\noh\n")
    assert gone.process.wait(20) == 141
    after, job, early = root.many([["logs", name] for name in ("t1", ids[0], "late")])
    assert (after.code, after.out.count('"one"'), after.out.count("three")) == (0, 2, 1)
    assert (job.code, job.out.count('"one"'), job.out.count('"two"'), job.err) == (0, 1, 0, "")
    refused(early, ["late"], 1, "task late of worker w1 has no log under")
    assert stop(worker).code == 0


def test_a_follower_stays_when_the_worker_goes_and_another_one_comes(root: Root) -> None:
    worker = root.worker()
    root.drop("t1", "text one", "wait gate", "done two")
    follows = root.start("logs", "t1", "--follow")
    follows.line_with('"one"')
    assert stop_twice(root, worker).code == 143  # put back: attempt 1 begins again
    worker = root.worker()
    follows.line_with('"one"')
    worker.process.kill()  # the attempt never gets an end
    worker.end()
    root.until(lambda: root.cli.alive() == [follows.process.pid], "an end of the orphans")
    worker = root.worker()
    follows.line_with('"one"')
    root.go("gate")
    follows.line_with("two")
    done = follows.end()
    assert done.code == 0
    assert [line.split(" (")[0] for line in done.err.splitlines()] == [
        "supervise: attempt 1",
        "supervise: attempt 1",
        "supervise: attempt 2",
    ]
    assert root.result("t1")["attempt"] == 2
    assert stop(worker).code == 0


def test_a_dead_letter_that_was_tried_again_does_not_show_its_former_life_as_what_came_later(root: Root) -> None:
    worker = root.worker(env={"SUPERVISE_WORKER__MAX_ATTEMPTS": "2"})
    root.drop("t1", "text one", "wait gate", "fail wrong")
    root.go("gate")
    root.letter("t1")
    (root.cli.workspace / "gate").unlink()
    assert root.do("dlq", "retry", "t1").code == 0
    root.until(lambda: root.is_at_work("t1", "one") and not root.is_at_work("t1", "wrong"), "a new first attempt")
    done = root.do("logs", "t1")
    assert (done.code, done.out.count('"one"'), done.out.count("wrong")) == (0, 1, 0)
    root.go("gate")
    root.letter("t1")
    assert stop(worker).code == 0


def test_of_two_workers_with_one_id_one_has_to_be_named(root: Root) -> None:
    workers = {name: root.start("worker", name, "--json") for name in ("w1", "w2")}
    for name, worker in workers.items():
        root.ready(worker, name)
        root.drop("t1", f"text of {name}", "done", worker=name)
    for name in workers:
        root.result("t1", name)
    both, first, second, third = root.many([["logs", "t1", *words] for words in ([], *_each("w1", "w2", "w3"))])
    refused(both, ["both"], 1, "workers w1, w2 have tasks of this id; say which (--worker)")
    refused(third, ["w3"], 1, "nobody knows it")
    assert ("of w1" in first.out, "of w2" in first.out) == (True, False)
    assert ("of w1" in second.out, "of w2" in second.out) == (False, True)
    for worker in workers.values():
        worker.process.send_signal(signal.SIGTERM)
    for worker in workers.values():
        assert worker.end().code == 0


def _each(*workers: str) -> list[list[str]]:
    return [["--worker", name] for name in workers]


def test_the_log_of_a_job_of_run_is_shown_too(cli: Cli) -> None:
    job = cli.start("run", "--job-id", "j1", "--set", "index.mode=none", "hang")
    Root.until((cli.state / "jobs/j1/agent.stdout.log").exists, "a log")
    follows = cli.start("logs", "j1", "--follow")
    follows.line_with("hanging")
    job.process.send_signal(signal.SIGTERM)
    assert job.end().code == 143
    done = follows.end()
    assert (done.code, done.err) == (0, "")


def test_wrong_use_is_told_in_one_line(root: Root) -> None:
    root.make()
    (root.cli.state / "jobs").mkdir(parents=True)
    cases: list[tuple[list[str], int, str]] = [
        ([""], 2, "a task's id is '', but must match"),
        ([".."], 2, "a task's id is '..', but must match"),
        (["../jobs", "--follow"], 2, "a task's id is '../jobs', but must match"),
        (["t1"], 1, "nobody knows it"),
        (["t1", "--root", str(root.path / "nowhere")], 1, "nobody knows it"),
        (["t1", "--worker", "../w1"], 1, "nobody knows it"),
        (["t1", "--set", "worker.rot=x"], 2, "worker.root"),
        ([], 2, "supervise logs needs TASK: id of a task, or of a job"),
    ]
    for done, (words, code, text) in zip(root.many([["logs", *words] for words, _, _ in cases]), cases, strict=True):
        refused(done, words, code, text)
    refused(root.cli.do("logs", "t1"), ["no root"], 2, "no root was named")


async def test_a_job_that_begins_again_does_not_show_its_old_log_once_more(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    path, end = tmp_path / "agent.stdout.log", tmp_path / "result.json"
    path.write_text("old\n")
    end.write_text("{}")
    log = Log(tmp_path, "stdout", Stdout(writing, lambda: None))
    with open(reading, "rb", buffering=0) as shown:
        try:
            await log.print(log.has_ended)
            assert (shown.read(), log.has_begun_again()) == (b"old\n", False)
            end.unlink()
            assert log.has_begun_again()
            looks = []

            def is_over() -> bool:
                looks.append(shown.read())
                if len(looks) == 2:  # only now the agent begins
                    path.write_text("new\n")
                return len(looks) == 3

            await log.print(is_over)
            assert looks == [None, None, b"new\n"]
        finally:
            os.close(writing)
