"""`supervise dlq` as a user has it: dead letters are listed, shown, tried again and dropped."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path

from tests.cli.conftest import WITHOUT_RIGHTS, Root, refused
from tests.cli.test_worker_cli import stop

LONG = "it went wrong in a way that takes more words to tell than any narrow terminal has room for, and then some"
EVIL = "[/red] [bold]\x1b[2J\x07 \u2028"


def on_terminal(root: Root, columns: int, *words: str) -> str:
    """What a person sees of a command, on a terminal so wide."""
    ours, theirs = pty.openpty()
    try:
        env = {"COLUMNS": str(columns), "TERM": "xterm-256color"}
        running = root.start(*words, env=env, stdout=theirs)
    finally:
        os.close(theirs)
    seen, deadline = b"", time.monotonic() + 20
    while True:
        assert select.select([ours], [], [], deadline - time.monotonic())[0]
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
        if not data:
            break
        seen += data
    os.close(ours)
    assert running.end().code == 0
    return seen.decode()


def test_dead_letters_are_listed_for_people_and_for_programs(root: Root) -> None:
    root.make("w1")
    root.make("w2")
    root.bury("t1", dlq_detail=LONG, dlq_timestamp="2026-11-21T12:00:02.000000Z")
    root.bury("t2", worker="w2", dlq_detail=EVIL, attempts=[{}, {}, {}], name_="x")
    root.bury("-", name="no task[red]", raw=b"\xff", dlq_timestamp="2026-11-21T12:00:01.000000Z", name_of="mine")
    (root.path / "dlq/w1/torn.json").write_bytes(b"{")
    (root.path / "dlq/w1/.t9.json.0123abcd").write_bytes(b"{}")
    plain, narrow_json, of_one = root.many(
        [["dlq", "list"], ["dlq", "list", "--json"], ["dlq", "list", "--worker", "w2"]]
    )
    assert (plain.code, plain.err) == (0, "supervise: 4 dead letters\n")
    rows = [line.split() for line in plain.out.splitlines()]
    assert rows[0] == ["name", "worker", "reason", "since", "tries", "detail"]
    assert [row[0] for row in rows[1:]] == ["torn", "t2", "no", "t1"]  # the oldest first
    assert rows[2][1:5] == ["w2", "auth", "2026-11-21T12:00:00", "3"]
    assert "[/red] [bold] [2J" in plain.out
    assert LONG in plain.out
    assert "\x1b" not in plain.out + plain.err
    assert [row[0] for row in map(str.split, of_one.out.splitlines())] == ["name", "t2"]
    assert of_one.err == "supervise: 1 dead letter\n"
    told = {line["name"]: line for line in map(json.loads, narrow_json.out.rstrip("\n").split("\n"))}
    assert sorted(told) == ["no task[red]", "t1", "t2", "torn"]
    assert told["t1"]["worker"] == "w1"
    assert told["t1"]["file"] == str(root.path / "dlq/w1/t1.json")
    assert told["t1"]["record"] == root.read("dlq", "t1")
    assert told["no task[red]"]["raw"] == str(root.path / "dlq/w1/no task[red].raw")
    assert told["torn"]["record"] == {}
    below, narrow, wide = (on_terminal(root, columns, "dlq", "list") for columns in (40, 76, 200))
    assert LONG in wide
    assert LONG not in narrow
    assert "…" in narrow
    assert all(re.search(rf"^{name} +w\d +auth ", narrow, re.MULTILINE) for name in ("t1", "t2"))
    assert ("since" in narrow, "since" in wide) == (False, True)  # there is no room for it
    assert "".join(LONG.split()) in "".join(below.split())  # where there is no column for it, it is told below
    assert re.search(r"^(\x1b\[1m)?no task\[red\]", below, re.MULTILINE)
    for seen in (below, narrow, wide):
        assert "\x1b[2J" not in seen
        assert "\x07" not in seen
    reader = root.start("dlq", "list", "--json")
    assert reader.process.stdout is not None
    reader.process.stdout.close()
    assert reader.process.wait(20) == 141
    assert reader.process.stderr is not None
    assert b"Traceback" not in reader.process.stderr.read()


def test_dead_letters_are_shown_tried_again_and_dropped(root: Root) -> None:
    root.make("w1")
    root.make("w2")
    for name in ("t1", "t2", "t3"):
        root.bury(name)
    root.bury("t1", worker="w2")
    root.bury("t4", name="t4~2", worker="w2", name_="of its own")
    root.bury("", name="raw", raw=b"no \xff task")
    (root.path / "dlq/w1/odd.json").write_text("{}")
    (root.path / "dlq/w1/odd.raw").mkdir()
    root.drop("t3", "x")
    root.drop("t3~retry", "x")
    before = root.files()
    commands: list[tuple[list[str], int, str]] = [
        (["show", "nobody"], 1, "there is no dead letter 'nobody'; supervise dlq list tells which there are"),
        (["show"], 2, "no dead letter was named"),
        (["retry", "t2", "nobody"], 1, "there is no dead letter 'nobody'"),
        (["retry"], 2, "name dead letters, or give --all"),
        (["drop"], 2, "name dead letters, or give --all"),
        (["drop", "--all", "t1"], 2, "name dead letters, or give --all"),
        (["drop", "t1"], 1, "workers w1, w2 have dead letters 't1'; say which one is meant (--worker)"),
        (["retry", "t3"], 1, ".json is there already; wait until it is done, or remove it"),
        (["drop", "odd"], 1, "odd.raw is a directory"),
        (["list", "--worker", "../tasks"], 1, "no worker '../tasks' has run under"),
        (["list", "--worker", "w9"], 1, "no worker 'w9' has run under"),
        (["list", "--root", str(root.path / "nowhere")], 1, "no worker has run under this root"),
        (["list", "--set", "worker.rot=x"], 2, "worker.root"),
    ]
    dones = root.many([["dlq", *words] for words, _, _ in commands])
    for done, (words, code, text) in zip(dones, commands, strict=True):
        refused(done, words, code, text)
    (root.path / "dlq/w1").chmod(0o555)
    bound = root.do("dlq", "drop", "t2", prefix=WITHOUT_RIGHTS)
    refused(bound, ["without rights"], 1, "dlq/w1/t2.json: Permission denied")
    (root.path / "dlq/w1").chmod(0o755)
    assert root.files() == before
    shown, again, raw, dropped, rest = root.many(
        [
            ["dlq", "show", "t4", "raw"],
            ["dlq", "retry", "t1", "--worker", "w1"],
            ["dlq", "retry", "raw"],
            ["dlq", "drop", "t4~2", "t1", "--worker", "w2"],
            ["dlq", "drop", "--all"],
        ]
    )
    assert shown.code == 0
    decoder, first = json.JSONDecoder(), shown.out
    letter, end = decoder.raw_decode(first)
    assert (letter["name"], letter["record"]["name_"], letter["record"]["task_id"]) == ("t4~2", "of its own", "t4")
    letter, _ = decoder.raw_decode(first[end:].lstrip())
    assert letter["raw"] == str(root.path / "dlq/w1/raw.raw")
    for done, name, data in ((again, "t1", before["dlq/w1/t1.json"]), (raw, "raw", b"no \xff task")):
        words, _, path = done.err.rstrip("\n").rpartition(": ")
        assert (done.code, words) == (0, f"supervise: {name} waits again")
        assert Path(path).parent == root.path / "tasks/w1"
        assert Path(path).read_bytes() == data
    assert (dropped.code, root.names("dlq", "w2")) == (0, [])
    assert rest.code == 1  # one could not be, which keeps no other from it
    assert "supervise: t2 is removed\n" in rest.err
    assert "odd.raw is a directory" in rest.err
    assert root.names("dlq") == ["odd.json", "odd.raw"]


def test_a_letter_may_be_tried_again_beside_a_running_worker(root: Root) -> None:
    worker = root.worker("w1", env={"SUPERVISE_WORKER__MAX_ATTEMPTS": "1"})
    for number in range(3):
        root.drop(f"t{number}", f"first wrong {number}", "done well")
    (root.path / "tasks/w1/bad.json").write_bytes(b'["no task"]')
    for name in ("t0", "t1", "t2", "bad"):
        root.letter(name)
    config = root.cli.root / "config.toml"
    config.write_text(f'[worker]\nroot = "{root.path}"\n')
    done = root.cli.do("dlq", "retry", "--all", "--config", str(config))
    assert (done.code, done.err.count(" waits again: ")) == (0, 4)
    for number in range(3):
        result = root.result(f"t{number}")
        assert (result["status"], result["attempt"], result["text"]) == ("completed", 1, "well")
    root.until(lambda: len(root.names("dlq")) == 2, "a dead letter of what still is no task")
    record, raw = root.names("dlq")
    assert (root.read("dlq", record.removesuffix(".json")) or {})["dlq_reason"] == "invalid_format"
    assert (root.path / "dlq/w1" / raw).read_bytes() == b'["no task"]'
    assert stop(worker).code == 0
    assert root.names("tasks") == []


def test_a_pipe_that_is_closed_early_is_no_error(root: Root) -> None:
    root.make("w1")
    for number in range(100):
        root.bury(f"t{number}", dlq_detail=LONG)
    running = root.start("dlq", "list")
    assert running.process.stdout is not None
    fcntl.fcntl(running.process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    head = subprocess.run(["head", "-1"], stdin=running.process.stdout, capture_output=True, check=True)
    running.process.stdout.close()
    assert head.stdout.startswith(b"name ")
    running.process.stdout = None
    done = running.end()
    assert (done.code, done.err) == (141, "")
