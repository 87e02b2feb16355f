"""`supervise doctor`: what the machine gives, and what killed supervisors have left."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from supervise.processes import identity
from tests.cli.conftest import LIMIT, Cli, Done

#: The agent says that it works, and does for as long as a test may take.
AGENT = """#!/bin/sh
echo '{"type":"system","subtype":"init","session_id":"s"}'
echo $$ > pid.new
mv pid.new pid
trap '' TERM
while :; do sleep 1; done
"""


def checks(done: Done, name: str) -> list[dict[str, Any]]:
    [told] = [json.loads(line) for line in done.out.splitlines()]
    return [check for check in told["checks"] if check["name"] == name]


def abandoned(cli: Cli) -> int:
    """A job on a bare process group whose supervisor was killed with -9. Returns the pid of its agent."""
    agent = cli.root / "bin" / "agent"
    agent.write_text(AGENT)
    agent.chmod(0o755)
    words = ("--set", f"agent.command={agent}", "--set", "containment=process-group", "--set", "index.mode=none")
    running = cli.start("run", "--json", *words, "work")
    pid = cli.workspace / "pid"
    deadline = time.monotonic() + LIMIT
    while not pid.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait(LIMIT)
    return int(pid.read_text())


def test_a_good_machine_has_no_error(cli: Cli) -> None:
    done = cli.do("doctor")
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    lines = done.out.splitlines()
    assert any(line.split()[:3] == ["ok", "containment", "guardian"] for line in lines)
    assert any(line.split()[:2] == ["ok", "leftovers"] for line in lines)
    assert any("cidx" in line and line.startswith("warning") for line in lines)  # it is not on this PATH
    assert "index.command" in done.out  # the mend
    assert not (cli.state / "run").exists() or list((cli.state / "run").iterdir()) == []


def test_json_is_one_object(cli: Cli) -> None:
    done = cli.do("doctor", "--json")
    told = json.loads(done.out)
    assert (told["type"], told["sweep"]) == ("doctor", None)
    assert told["containment"] in ("guardian", "guardian and cgroup")
    for check in told["checks"]:
        assert check["level"] in ("ok", "warning", "error")
        assert check["text"]
        assert check["mend"] or check["level"] == "ok"


def test_a_weaker_tier_is_a_warning_that_says_why(cli: Cli) -> None:
    done = cli.do("doctor", "--json", "--set", "containment=process-group")
    assert done.code == 0
    [tier, why] = checks(done, "containment")
    assert (tier["level"], tier["text"]) == ("warning", "process group")
    assert "until the next start" in tier["mend"]
    assert "asks for process-group" in why["text"]


def test_a_state_directory_that_cannot_be_made_is_an_error(cli: Cli) -> None:
    (cli.root / "file").touch()
    done = cli.do("doctor", "--json", "--set", f"state_dir={cli.root}/file/state")
    assert done.code == 1
    [check] = checks(done, "state")
    assert (check["level"], "SUPERVISE_STATE_DIR" in check["mend"]) == ("error", True)
    assert "Not a directory" in check["text"]


def test_few_descriptors_are_a_warning_that_says_how_many_are_enough(cli: Cli) -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    done = cli.do("doctor", "--json", preexec_fn=few)
    [check] = checks(done, "descriptors")
    assert check["level"] == "warning"
    assert "128 open files" in check["text"]
    assert "ulimit -n" in check["mend"]


def test_an_agent_that_answers_is_told_with_its_version(cli: Cli) -> None:
    program = cli.root / "bin" / "claude"
    program.write_text("#!/bin/sh\necho 9.8.7 '(a fake)'\n")
    [check] = checks(cli.do("doctor", "--json"), "agent")
    assert check["level"] == "ok"
    assert check["text"].endswith("claude: 9.8.7 (a fake)")
    program.write_text("#!/bin/sh\nexit 3\n")
    [check] = checks(cli.do("doctor", "--json"), "agent")
    assert check["level"] == "warning"
    assert "3" in check["text"]


def test_leftovers_are_told_and_swept(cli: Cli) -> None:
    agent = abandoned(cli)
    before = identity.read(agent)
    assert before is not None
    assert before.alive
    done = cli.do("doctor", "--json")
    [check] = checks(done, "leftovers")
    assert check["level"] == "warning"
    assert "doctor --sweep" in check["mend"]
    assert identity.read(agent) is not None  # only told
    done = cli.do("doctor", "--sweep", "--json")
    assert done.code == 0
    told = json.loads(done.out)["sweep"]
    assert told["supervisors"] == 1
    assert agent in {each["pid"] for each in told["found"]}
    assert told["survivors"] == []
    assert cli.alive() == []
    assert list((cli.state / "run").iterdir()) == []
    done = cli.do("doctor", "--sweep")
    assert "no supervisor has left anything" in done.out


def test_the_next_job_sweeps_by_itself(cli: Cli) -> None:
    agent = abandoned(cli)
    done = cli.do("run", "--json", "--set", "index.mode=none", "say hello")
    assert done.code == 0
    assert f"{agent} (" in done.err
    assert "earlier supervisor had left were ended" in done.err
    assert cli.alive() == []


def test_limits_that_this_machine_cannot_keep_fail_the_job(cli: Cli) -> None:
    words = ("--json", "--set", "index.mode=none", "--set", "containment=guardian", "--max-memory", str(1 << 30))
    done = cli.do("run", *words, "--max-processes", "50", "say hello")
    assert done.code == 1
    assert done.result["failure_kind"] == "spawn"
    assert "not available here" in done.result["error"]


@pytest.mark.parametrize("words", [["--max-memory", "0"], ["--max-processes", "0"], ["--max-processes", "-1"]])
def test_a_limit_of_zero_is_wrong_use(cli: Cli, words: list[str]) -> None:
    done = cli.do("run", *words, "say hello")
    assert done.code == 2
    assert "or more" in done.err
    assert "Traceback" not in done.err


def test_a_python_that_cannot_be_started_is_told(cli: Cli) -> None:
    code = "import sys; sys.executable = ''; from supervise.cli.app import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"],
        env=cli.env,
        cwd=cli.workspace,
        capture_output=True,
        check=False,
    )
    told = json.loads(done.stdout)
    assert told["containment"] in ("", "process group")
    assert "sys.executable" in done.stdout.decode()
