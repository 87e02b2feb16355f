"""Every word and option of every command does something: for each there is a test that says so."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from supervise.cli.reference import Command, commands
from supervise.codec import to_line
from supervise.dispatch.submit import job_id_of
from tests.cli.conftest import Cli, Root
from tests.unit.test_timeline import JOB as LIFE

HERE = Path(__file__).parent

RUN = "test_run.py::"
REACH = RUN + "test_options_reach_the_agent"
SETTINGS = RUN + "test_settings_by_file_environment_and_command_line"
HEEDED = "test_worker_cli.py::test_each_option_is_heeded"
LOCK = "test_worker_cli.py::test_a_second_instance_is_refused_or_waits"
SUBMIT = "test_submit.py::test_each_option_reaches_the_task"
LOGS = "test_logs.py::test_logs_tell_of_all_attempts_while_they_run_and_afterwards"
LISTED = "test_dlq.py::test_dead_letters_are_listed_for_people_and_for_programs"
TRIED = "test_dlq.py::test_dead_letters_are_shown_tried_again_and_dropped"
ROOTS = "test_options.py::test_a_root_is_named_by_option_by_setting_and_by_file"
OF_SEVERAL = "test_options.py::test_a_worker_is_named_where_several_have_such_a_letter"
LOOKS = "test_options.py::test_what_only_looks_heeds_its_options"
BOUNDS = "test_options.py::test_place_user_and_limits_of_a_job"
SCRIPTS = "test_options.py::test_scripts_are_taken_from_where_it_is_said"
AS_JOB = "test_options.py::test_a_script_runs_as_its_options_say"
DEMO = "test_demo.py::"

#: Command -> word or option -> the test that proves that it does something.
PROOFS: dict[str, dict[str, str]] = {
    "demo": {
        "--fault": DEMO + "test_a_kill_is_told_in_words",
        "--keep": DEMO + "test_keep_keeps_the_scratch_directory",
        "--json": DEMO + "test_a_signal_ends_the_demo",
    },
    "run": {
        "PROMPT": RUN + "test_the_prompt_may_come_from_standard_input",
        "--workspace": BOUNDS,
        "--timeout": RUN + "test_a_timeout_is_exit_code_124",
        "--job-id": RUN + "test_json_is_on_standard_output_and_nothing_else",
        "--user": BOUNDS,
        "--max-memory": BOUNDS,
        "--max-processes": BOUNDS,
        "--model": REACH,
        "--max-turns": REACH,
        "--max-budget-usd": REACH,
        "--allowed-tools": REACH,
        "--permission-mode": REACH,
        "--resume": REACH,
        "--session-id": REACH,
        "--system-prompt-file": REACH,
        "--append-system-prompt-file": REACH,
        "--agent-arg": REACH,
        "--set": SETTINGS,
        "--config": SETTINGS,
        "--log-format": "test_terminal.py::test_with_json_each_line_on_standard_error_is_an_object",
        "--json": RUN + "test_json_is_on_standard_output_and_nothing_else",
    },
    "timeline": {
        "JOB": LOOKS,
        "--svg": LOOKS,
        "--root": ROOTS,
        "--set": ROOTS,
        "--config": ROOTS,
        "--json": LOOKS,
    },
    "scripts list": {"--dir": SCRIPTS, "--set": SCRIPTS, "--config": SCRIPTS, "--json": SCRIPTS},
    "scripts search": {"QUERY": SCRIPTS, "--dir": SCRIPTS, "--set": SCRIPTS, "--config": SCRIPTS, "--json": SCRIPTS},
    "scripts show": {"NAME": SCRIPTS, "--dir": SCRIPTS, "--set": SCRIPTS, "--config": SCRIPTS, "--json": SCRIPTS},
    "scripts run": {
        "NAME": SCRIPTS,
        "ARGS": AS_JOB,
        "--input": AS_JOB,
        "--workspace": AS_JOB,
        "--timeout": AS_JOB,
        "--job-id": AS_JOB,
        "--user": AS_JOB,
        "--max-memory": AS_JOB,
        "--max-processes": AS_JOB,
        "--dir": SCRIPTS,
        "--set": SCRIPTS,
        "--config": SCRIPTS,
        "--log-format": AS_JOB,
        "--json": AS_JOB,
    },
    "worker": {
        "NAME": LOCK,
        "--root": HEEDED,
        "--workspace": HEEDED,
        "--max-concurrent": HEEDED,
        "--executor": "test_worker_cli.py::test_metrics_are_served_while_it_runs",
        "--lock-file": "test_worker_cli.py::test_a_lock_file_is_a_pid_file_for_shells",
        "--lock-timeout": LOCK,
        "--drain-timeout": "test_worker_cli.py::test_a_drain_that_takes_too_long_puts_its_task_back_and_is_a_failure",
        "--metrics-port": "test_worker_cli.py::test_metrics_are_served_while_it_runs",
        "--set": HEEDED,
        "--config": HEEDED,
        "--log-format": "test_terminal.py::test_a_worker_logs_of_task_job_and_worker",
        "--json": "test_worker_cli.py::test_a_signal_drains_a_worker_that_then_leaves_results_and_nothing_else",
    },
    "submit": {
        "WORKER": SUBMIT,
        "DESCRIPTION": SUBMIT,
        "--root": SUBMIT,
        "--task-id": SUBMIT,
        "--script": SUBMIT,
        "--script-arg": SUBMIT,
        "--priority": SUBMIT,
        "--depends-on": SUBMIT,
        "--workspace": SUBMIT,
        "--timeout": SUBMIT,
        "--max-attempts": SUBMIT,
        "--not-before": SUBMIT,
        "--metadata": SUBMIT,
        "--wait": "test_submit.py::test_who_waits_is_told_what_became_of_the_task",
        "--set": SUBMIT,
        "--config": SUBMIT,
        "--json": SUBMIT,
    },
    "logs": {
        "TASK": LOGS,
        "--root": ROOTS,
        "--worker": "test_logs.py::test_of_two_workers_with_one_id_one_has_to_be_named",
        "--stderr": LOGS,
        "--follow": LOGS,
        "--set": ROOTS,
        "--config": ROOTS,
    },
    "dlq list": {"--root": ROOTS, "--worker": LISTED, "--set": ROOTS, "--config": ROOTS, "--json": LISTED},
    "dlq show": {"NAMES": TRIED, "--root": ROOTS, "--worker": OF_SEVERAL, "--set": ROOTS, "--config": ROOTS},
    "dlq retry": {
        "NAMES": TRIED,
        "--all": "test_dlq.py::test_a_letter_may_be_tried_again_beside_a_running_worker",
        "--root": ROOTS,
        "--worker": TRIED,
        "--set": ROOTS,
        "--config": ROOTS,
    },
    "dlq drop": {
        "NAMES": TRIED,
        "--all": TRIED,
        "--root": ROOTS,
        "--worker": TRIED,
        "--set": ROOTS,
        "--config": ROOTS,
    },
    "doctor": {
        "--sweep": "test_doctor.py::test_leftovers_are_told_and_swept",
        "--set": LOOKS,
        "--config": LOOKS,
        "--json": "test_doctor.py::test_json_is_one_object",
    },
    "config": {"NAME": LOOKS, "--example": LOOKS, "--set": LOOKS, "--config": LOOKS, "--json": LOOKS},
    "completion": {"SHELL": "test_help.py::test_a_shell_completes_by_the_script"},
}


# --- the table -----------------------------------------------------------------------------------------------


@cache
def definitions(file: Path) -> Mapping[str, ast.stmt]:
    """What a module defines at its top."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found[node.name] = node
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = node
    return found


def source(file: Path, test: str) -> str:
    """The text of a test, and of what it uses of its module: constants, fixtures, helpers."""
    known = definitions(file)
    lines = file.read_text(encoding="utf-8").splitlines()
    wanted, texts = [test], {}
    while wanted:
        name = wanted.pop()
        if name in texts or name not in known:
            continue
        node = known[name]
        decorators = [each.lineno for each in getattr(node, "decorator_list", ())]
        texts[name] = "\n".join(lines[min([node.lineno, *decorators]) - 1 : node.end_lineno])
        wanted += [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]
        wanted += [each.arg for each in ast.walk(node) if isinstance(each, ast.arg)]
    return "\n".join(texts.values())


def problems(these: list[Command], proofs: Mapping[str, Mapping[str, str]], directory: Path) -> Iterator[str]:
    """What is not proved, or by nothing that is there."""
    there = {
        " ".join(words[1:]): [argument.names[0] for argument in app.assemble_argument_collection()]
        for words, app in these
    }
    for command in there.keys() | proofs.keys():
        for option in there.get(command, ()):
            if option not in proofs.get(command, {}):
                yield f"no test for {command} {option}"
        for option, proof in proofs.get(command, {}).items():
            file, _, test = proof.partition("::")
            if option not in there.get(command, ()):
                yield f"{command} {option} is no more"
            elif not (directory / file).is_file() or test not in definitions(directory / file):
                yield f"{command} {option}: {proof} is not there"
            else:
                word = option if option.startswith("-") else command.split()[-1]
                if not re.search(rf"(?<![\w-]){word}(?![\w-])", source(directory / file, test)):
                    yield f"{command} {option}: {proof} does not mention {word}"


def test_every_word_and_option_has_a_test() -> None:
    assert list(problems(list(commands()), PROOFS, HERE)) == []


def test_a_table_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        'WORDS = ["drop", "--all", "--rooted"]\n'
        "def test_one():\n    assert WORDS\n"
        'def test_two():\n    assert "--set"\n'
    )
    these = [(words, app) for words, app in commands() if words[1:] == ("dlq", "drop")]
    one, two = "test_x.py::test_one", "test_x.py::test_two"
    good = {"NAMES": one, "--all": one, "--root": two, "--worker": one, "--set": two, "--config": one}
    told = set(problems(these, {"dlq drop": good}, tmp_path))
    assert told == {
        "dlq drop --root: test_x.py::test_two does not mention --root",
        "dlq drop --worker: test_x.py::test_one does not mention --worker",
        "dlq drop --config: test_x.py::test_one does not mention --config",
    }
    bad = {**good, "--root": one, "--worker": "test_x.py::test_no", "--config": "no.py::test_one", "--old": one}
    del bad["--set"]
    told = set(problems(these, {"dlq drop": bad, "dlq burn": {"--all": one}}, tmp_path))
    assert told == {
        "dlq drop --root: test_x.py::test_one does not mention --root",
        "dlq drop --worker: test_x.py::test_no is not there",
        "dlq drop --config: no.py::test_one is not there",
        "dlq drop --old is no more",
        "no test for dlq drop --set",
        "dlq burn --all is no more",
    }


# --- tests of what has none elsewhere ------------------------------------------------------------------------

WAYS = ("--root", "--set", "--config")


@pytest.fixture
def several(root: Root, tmp_path: Path) -> dict[str, Root]:
    """A root for each way to name one, each with the same tasks; the user's file names another."""
    roots = {}
    del root.env["SUPERVISE_WORKER__ROOT"]
    for way in ("file", *WAYS):
        each = roots[way] = Root(root.cli)
        each.path = tmp_path / f"root of {way.strip('-')}"
        each.make()
        for name in ("letter", "again", "gone"):
            each.bury(name, dlq_detail=f"it is of {way}")
        (each.path / "results/w1/done.json").write_text(json.dumps({"task_id": "done", "status": "completed"}))
        job = root.cli.state / "jobs" / job_id_of("w1", "done", 1, each.path)
        job.mkdir(parents=True)
        (job / "agent.stdout.log").write_text(f"it is of {way}\n")
        (job / "result.json").write_text("{}")
        life = [{**event, "job_id": job.name} for event in LIFE]
        (job / "events.jsonl").write_bytes(b"".join(map(to_line, life)))
    users = root.cli.root / "config/supervise/supervise.toml"
    users.parent.mkdir(parents=True)
    users.write_text(f'[worker]\nroot = "{roots["file"].path}"\n')
    (tmp_path / "named.toml").write_text(f'[worker]\nroot = "{roots["--config"].path}"\n')
    return roots


def test_a_root_is_named_by_option_by_setting_and_by_file(root: Root, several: dict[str, Root], tmp_path: Path) -> None:
    before = several["file"].files()
    named = {
        "--root": ["--root", str(several["--root"].path)],
        "--set": ["--set", f"worker.root={several['--set'].path}"],
        "--config": ["--config", str(tmp_path / "named.toml")],
    }
    asked = ["dlq list", "dlq show letter", "dlq retry again", "dlq drop gone", "logs done", "timeline done --json"]
    given = [(way, words) for way in WAYS for words in asked]
    dones = dict(zip(given, root.many([[*words.split(), *named[way]] for way, words in given]), strict=True))
    for way in WAYS:
        done = {words.removesuffix(" --json"): dones[way, words] for words in asked}
        assert [each.code for each in done.values()] == [0] * len(asked), [each.err for each in done.values()]
        assert f"it is of {way}" in done["dlq list"].out
        assert json.loads(done["dlq show letter"].out)["record"]["dlq_detail"] == f"it is of {way}"
        assert several[way].names("tasks") == ["again.json"]
        assert several[way].names("dlq") == ["letter.json"]
        assert done["logs done"].out == f"it is of {way}\n"
        assert job_id_of("w1", "done", 1, several[way].path) in done["timeline done"].err
    assert several["file"].files() == before


def test_a_worker_is_named_where_several_have_such_a_letter(root: Root) -> None:
    for name in ("w1", "w2"):
        root.make(name)
        root.bury("t1", worker=name)
    both, one = root.many([["dlq", "show", "t1"], ["dlq", "show", "t1", "--worker", "w2"]])
    assert (both.code, both.out) == (1, "")
    assert json.loads(one.out)["worker"] == "w2"


def test_what_only_looks_heeds_its_options(root: Root, tmp_path: Path) -> None:
    """`config`, `doctor`, `timeline`."""
    named, picture = tmp_path / "named.toml", tmp_path / "life.svg"
    named.write_text(f'state_dir = "{tmp_path}/of the file"\n[index]\nmode = "cidx"\n')
    del root.env["SUPERVISE_INDEX__MODE"]
    job = root.cli.state / "jobs/j1"
    job.mkdir(parents=True)
    (job / "events.jsonl").write_bytes(b"".join(map(to_line, LIFE)))
    asked = {
        "all": ["config", "--json"],
        "one": ["config", "index.mode", "--json", "--set", "index.mode=none"],
        "table": ["config", "index", "--config", str(named)],
        "example": ["config", "--example"],
        "doctor": ["doctor", "--json", "--config", str(named)],
        "set": ["doctor", "--json", "--set", f"state_dir={tmp_path}/by option"],
        "drawn": ["timeline", "j1"],
        "json": ["timeline", "j1", "--json"],
        "svg": ["timeline", "j1", "--svg", str(picture)],
    }
    done = dict(zip(asked, root.many(list(asked.values())), strict=True))
    assert {name: each.code for name, each in done.items() if name not in ("doctor", "set")} == dict.fromkeys(
        set(asked) - {"doctor", "set"}, 0
    )
    every, one = json.loads(done["all"].out), json.loads(done["one"].out)
    assert len(json.dumps(one)) < len(json.dumps(every))
    assert "index.mode" in done["one"].out
    assert "command line" in done["one"].out
    assert "index.mode" in done["table"].out
    assert str(named) in done["table"].out
    assert "worker.root" not in done["table"].out
    assert "[index]" in done["example"].out
    assert "of the file" in done["doctor"].out
    assert "by option" in done["set"].out
    assert "agent" in done["drawn"].out
    assert json.loads(done["json"].out)["job_id"] == "j1"
    assert "<svg " in picture.read_text()
    assert (done["svg"].out, str(picture) in done["svg"].err) == ("", True)


def test_scripts_are_taken_from_where_it_is_said(root: Root, tmp_path: Path) -> None:
    places = {way: tmp_path / f"scripts of {way.strip('-')}" for way in ("file", "--dir", "--set", "--config")}
    for way, place in places.items():
        place.mkdir()
        script = place / "tell"
        script.write_text(f"#!/bin/sh\n# Description: it is of {way}\necho run of {way}\n")
        script.chmod(0o755)
    users, named = root.cli.root / "config/supervise/supervise.toml", tmp_path / "named.toml"
    users.parent.mkdir(parents=True)
    users.write_text(f'script_dirs = ["{places["file"]}"]\n')
    named.write_text(f'script_dirs = ["{places["--config"]}"]\n')
    ways = {
        "file": [],
        "--dir": ["--dir", str(places["--dir"])],
        "--set": ["--set", f"script_dirs={json.dumps([str(places['--set'])])}"],
        "--config": ["--config", str(named)],
    }
    asked = [["list"], ["search", "IT IS"], ["show", "tell"], ["run", "tell"], ["search", "nothing"]]
    given = [["scripts", *words, *way] for way in ways.values() for words in asked]
    programs = [["scripts", *words, "--json"] for words in asked[:3]]
    dones = root.many([*given, *programs])
    assert {done.code for done in dones} == {0}
    for number, way in enumerate(ways):
        *looks, ran, none = dones[number * len(asked) : (number + 1) * len(asked)]
        for done in looks:
            assert f"it is of {way}" in done.out
        assert ran.out == f"run of {way}\n"
        assert none.out == ""
    for done in dones[len(given) :]:
        assert json.loads(done.out)["description"] == "it is of file"


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody may use; pytest's own can be entered by its owner only."""
    directory = Path(tempfile.mkdtemp(prefix="supervise-test-"))
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


#: An agent that tells of itself, by way of its exit code: it speaks no protocol.
TELLS = "pwd; id -u; cd /sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup) && cat memory.max pids.max"


def test_place_user_and_limits_of_a_job(cli: Cli, public: Path) -> None:
    agent = json.dumps(["/bin/sh", "-c", TELLS])
    words = ["run", "--job-id", "told", "--workspace", str(public), "--set", f"agent.command={agent}"]
    if os.geteuid() != 0:
        refused = cli.do(*words, "--user", "nobody", "x")
        assert "root" in refused.err
    else:
        words += ["--user", "nobody"]
    done = cli.do(*words, "--max-memory", "100003840", "--max-processes", "77", "x")
    log = cli.state / "jobs/told/agent.stdout.log"
    if not log.exists():  # without a cgroup of its own, a job with limits is refused
        assert done.code == 1
        assert "--max-memory" in done.err or "memory" in done.err
        return
    place, user, memory, processes = log.read_text().splitlines()
    assert place == str(public)
    assert int(user) == (65534 if os.geteuid() == 0 else os.geteuid())
    assert (memory, processes) == ("100003840", "77")


def test_a_script_runs_as_its_options_say(root: Root, public: Path) -> None:
    script = public / "scripts" / "tell"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\n[ "$1" = slow ] && exec sleep 20\necho "$*"; cat; {TELLS}\n')
    script.chmod(0o755)
    run = ["scripts", "run", "--dir", str(script.parent), "tell"]
    user = ["--user", "nobody"] if os.geteuid() == 0 else []
    bounds = ["--max-memory", "100003840", "--max-processes", "77", "--workspace", str(public), "--job-id", "told"]
    words = ["--", "--fast", "for October"]
    full, late, as_json, logged = root.many(
        [
            [*run, "--input", "its input\n", *user, *bounds, *words],
            [*run, "slow", "--timeout", "0.3"],
            [*run, "one", "--json"],
            [*run, "one", "--log-format", "json"],
        ]
    )
    if "cgroup" in full.err and not full.out:  # this machine cannot bound it
        assert full.code == 1
    else:
        args, read, place, uid, memory, processes = full.out.splitlines()
        assert (args, read, place) == ("--fast for October", "its input", str(public))
        assert int(uid) == (65534 if user else os.geteuid())
        assert (memory, processes) == ("100003840", "77")
        assert (root.cli.state / "jobs/told/result.json").exists()
    assert late.code == 124
    assert as_json.result["text"].startswith("one\n")
    assert {"supervise.events"} <= {json.loads(line)["logger"] for line in logged.err.splitlines()}
