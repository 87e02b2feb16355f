"""`supervise submit` as a user has it: a task reaches its worker whole, or somebody is told why not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

from tests.cli.conftest import WITHOUT_RIGHTS, Root, refused
from tests.cli.test_worker_cli import stop


def test_each_option_reaches_the_task(root: Root, tmp_path: Path) -> None:
    root.make("w1")
    plain = root.start("submit", "w1", "Add tests.")
    piped = root.start("submit", "w1", "--task-id", "t2", "--json", stdin=subprocess.PIPE)
    place = f"worker.root={root.path}"
    dashed = root.cli.start("submit", "w1", "-", "--task-id", "t3", "--set", place, stdin=subprocess.PIPE)
    config = tmp_path / "config.toml"
    config.write_text(f'[worker]\nroot = "{root.path}"\n')
    full = root.start(
        *("submit", "w1", "--task-id", "t1", "--priority", "-3", "--depends-on", "a", "--depends-on", "b"),
        *("--workspace", "here", "--timeout", "7.5", "--max-attempts", "2", "--not-before", "2030-01-01T00:00:00Z"),
        *("--metadata", "ticket=12=13", "--metadata", "empty=", "--root", str(root.path), "--", "--all options"),
        env={"SUPERVISE_WORKER__ROOT": str(tmp_path / "nowhere")},
        cwd=tmp_path,
    )
    epoch = root.cli.start(
        *("submit", "w1", "x", "--task-id", "t4", "--not-before", "1900000000", "--priority", "urgent"),
        *("--script", "nightly", "--script-arg=--fast", "--script-arg", "for October", "--config", str(config)),
    )
    for running, data in ((piped, "Grüße\n"), (dashed, "dashed")):
        assert running.process.stdin is not None
        running.process.stdin.write(data.encode())
        running.process.stdin.close()
        running.process.stdin = None
    dones = {name: each.end() for name, each in {"t1": full, "t2": piped, "t3": dashed, "t4": epoch}.items()}
    done = plain.end()
    made = done.out.strip()
    assert done.out == f"{made}\n"
    assert (done.code, done.err) == (0, "")
    assert root.read("tasks", made) == {"task_id": made, "description": "Add tests.", "worker": "w1"}
    for name in ("t1", "t3", "t4"):
        assert (dones[name].code, dones[name].out, dones[name].err) == (0, f"{name}\n", "")
    told = {"type": "submitted", "task_id": "t2", "worker": "w1", "file": str(root.path / "tasks/w1/t2.json")}
    assert json.loads(dones["t2"].out) == told
    assert (root.read("tasks", "t2") or {})["description"] == "Grüße\n"
    assert (root.read("tasks", "t3") or {})["description"] == "dashed"
    assert root.read("tasks", "t1") == {
        "task_id": "t1",
        "description": "--all options",
        "worker": "w1",
        "priority": -3,
        "dependencies": ["a", "b"],
        "workspace": str(tmp_path / "here"),
        "timeout": 7.5,
        "max_attempts": 2,
        "not_before": "2030-01-01T00:00:00Z",
        "metadata": {"ticket": "12=13", "empty": ""},
    }
    fields = root.read("tasks", "t4") or {}
    assert (fields["not_before"], fields["priority"]) == (1900000000, "urgent")
    assert (fields["script"], fields["args"]) == ("nightly", ["--fast", "for October"])
    assert sorted(root.names("tasks")) == sorted([f"{made}.json", "t1.json", "t2.json", "t3.json", "t4.json"])


def test_wrong_use_is_told_in_one_line_and_writes_nothing(root: Root) -> None:
    root.make("w1")
    root.drop("waits", "x")
    (root.path / "tasks/w1/again~retry.json").write_text("{}")
    for kind, name in (("running", "runs"), ("results", "ended"), ("dlq", "buried")):
        (root.path / kind / "w1" / f"{name}.json").write_text("{}")
    before = root.files()
    cases: list[tuple[list[str], int, str]] = [
        (["w2", "x"], 1, "no worker 'w2' has run under this root; start it first: supervise worker w2 --root"),
        (["../tasks/w1", "x"], 2, "a worker's name is '../tasks/w1', but must match"),
        (["w1", "x", "--root", str(root.path / "nowhere")], 1, "nowhere/tasks/w1 is not there"),
        (["w1", "x", "--root", str(root.path / "dlq/w1/buried.json")], 1, "is not there"),
        (["w1", ""], 2, "description is '', but must be a text that is not empty"),
        (["w1"], 2, "description is '', but must be a text that is not empty"),
        (["w1", os.fsdecode(b"\xff")], 2, "description is '\\udcff', but must be"),
        (
            ["w1", "x" * 100_000 + "\n" + "\u00e9", "--metadata", "no equals"],
            2,
            "--metadata 'no equals' is no name=value",
        ),
        (["w1", "x", "--task-id", "a b"], 2, "task_id is 'a b', but must be"),
        (["w1", "x", "--task-id", "../up"], 2, "task_id is '../up', but must be"),
        (["w1", "x", "--priority", "very"], 2, "priority is 'very', but must be"),
        (["w1", "x", "--priority=--5"], 2, "priority is '--5', but must be"),
        (["w1", "x", "--priority", "9" * 5000], 2, "priority is '99"),
        (["w1", "x", "--priority", "1001"], 2, "priority is 1001, but must be"),
        (["w1", "x", "--not-before", "tomorrow"], 2, "not_before is 'tomorrow', but must be a time with its zone"),
        (["w1", "x", "--not-before", "2030-01-01T00:00:00"], 2, "a time with its zone"),
        (["w1", "x", "--timeout", "nan"], 2, "timeout is nan, but must be a number of seconds above 0"),
        (["w1", "x", "--timeout", "0"], 2, "timeout is 0.0, but must be"),
        (["w1", "x", "--max-attempts", "0"], 2, "max_attempts is 0, but must be"),
        (["w1", "x", "--depends-on", "a b"], 2, "dependencies is"),
        (["w1", "x", "--task-id", "a", "--depends-on", "a"], 2, "it would wait for ever"),
        (["w1", "x", "--wait", "nan"], 2, "--wait is nan, but must be a number of seconds, 0 or more"),
        (["w1", "x", "--wait", "-1"], 2, "--wait is -1.0"),
        (["w1", "x", "--set", "worker.rot=x"], 2, "worker.root"),
        (["w1", "x", "--script-arg", "fast"], 2, "--script-arg is given without --script; name the script"),
        (["w1", "x", "--task-id", "waits"], 1, "the task id 'waits' is taken"),
        (["w1", "x", "--task-id", "again"], 1, "again~retry.json is there; choose another (--task-id)"),
        (["w1", "x", "--task-id", "runs"], 1, "running/w1/runs.json is there"),
        (["w1", "x", "--task-id", "ended"], 1, "results/w1/ended.json is there"),
        (["w1", "x", "--task-id", "buried"], 1, "try that again (supervise dlq retry)"),
    ]
    for done, (words, code, text) in zip(root.many([["submit", *words] for words, _, _ in cases]), cases, strict=True):
        refused(done, [word[:40] for word in words], code, text)
    (root.path / "tasks" / "w1").chmod(0o555)
    bound = root.start("submit", "w1", "x", prefix=WITHOUT_RIGHTS)
    with open(root.cli.root / "latin1", "w+b") as file:
        file.write(b"Gr\xfc\xdfe")
        file.seek(0)
        foreign = root.start("submit", "w1", stdin=file)
    nowhere = root.cli.start("submit", "w1", "x")
    refused(bound.end(), ["without rights"], 1, "cannot be written to")
    refused(foreign.end(), ["latin1"], 2, "is not UTF-8 (byte 2); convert it")
    refused(nowhere.end(), ["no root"], 2, "no root was named: give --root, or set worker.root")
    (root.path / "tasks" / "w1").chmod(0o755)
    assert root.files() == before


def test_who_waits_is_told_what_became_of_the_task(root: Root) -> None:
    worker = root.worker("w1", "--max-concurrent", "4", env={"SUPERVISE_WORKER__MAX_ATTEMPTS": "1"})

    ended = {
        name: root.start("submit", "w1", "--task-id", name, "--wait", seconds, *words, steps)
        for name, seconds, words, steps in (
            ("bad", "30", (), "fail for good"),
            ("once", "30", ("--max-attempts", "2"), "first twice\ndone at last"),
            ("json", "30", ("--json",), "done as JSON"),
            ("late", "30", ("--timeout", "0.5"), "hang"),
            ("short", "0", (), "wait gate"),
            ("interrupted", "30", (), "wait gate\ndone after all"),
        )
    }
    waiting = ended.pop("interrupted")
    root.until(lambda: root.is_at_work("interrupted"), "a task under way")
    waiting.process.send_signal(signal.SIGINT)
    done = waiting.end()
    assert (done.code, done.out) == (130, "")
    assert "supervise: task interrupted goes on without us\n" in done.err
    dones = {name: each.end() for name, each in ended.items()}
    assert (dones["bad"].code, dones["bad"].out) == (1, "")
    assert "supervise: task bad is a dead letter (max_retries_exceeded): " in dones["bad"].err
    assert (dones["once"].code, dones["once"].out) == (0, "at last\n")
    assert dones["once"].err == "supervise: task once waits for worker w1\n"
    assert json.loads(dones["json"].out)["text"] == "as JSON"
    assert dones["json"].code == 0
    assert (dones["late"].code, dones["late"].out) == (124, "")
    assert "supervise: task late timed_out: " in dones["late"].err
    assert (dones["short"].code, dones["short"].out) == (124, "")
    assert "supervise: task short has no result after 0 s; it goes on: supervise logs short\n" in dones["short"].err
    root.go("gate")
    assert root.result("interrupted")["text"] == "after all"
    assert root.result("short")["status"] == "completed"
    assert stop(worker).code == 0
