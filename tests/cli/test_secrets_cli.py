"""Secrets: the agent cannot read the supervisor's, and what it prints of its own is masked in every sink."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import supervise
from tests.cli.conftest import Cli, Done

KEY = "sk-ant-TopSecret-0123456789abcdef"
VOYAGE = "pa-AlsoSecret-9876543210"
NOBODY = 65534

REPOSITORY = Path(supervise.__file__).parents[1]
PACKAGES = sysconfig.get_path("purelib")


def find_python() -> str | None:
    """An interpreter that an ordinary user can start, and that finds this project."""
    needed = "import cyclopts, orjson, rich, supervise, trio, typed_settings"
    for python in (sys.executable, "/usr/bin/python3", shutil.which("python3")):
        try:
            done = subprocess.run(
                [str(python), "-c", needed],
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
                cwd="/",
                env={"PYTHONPATH": f"{REPOSITORY}:{PACKAGES}"},
                capture_output=True,
                timeout=30,
            )
        except OSError:
            continue
        if done.returncode == 0:
            return python
    return None


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory of the ordinary user's; pytest's own can be entered by its owner only."""
    directory = Path(tempfile.mkdtemp(prefix="supervise-test-"))
    yield directory
    shutil.rmtree(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a command as another user")
def test_the_agent_of_an_ordinary_user_cannot_read_the_environment_of_its_supervisor(public: Path) -> None:
    python = find_python()
    if python is None:
        pytest.skip("no interpreter that an ordinary user can start finds this project")
    agent = Path(shutil.copy(Path(__file__).with_name("fake_claude.py"), public / "agent.py"))
    for path in (public, agent):
        os.chown(path, NOBODY, NOBODY)
    command = [python, "-m", "supervise", "run", "--json", "--workspace", str(public), "ask"]
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(public),
        "PYTHONPATH": f"{REPOSITORY}:{PACKAGES}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SUPERVISE_AGENT__COMMAND": json.dumps([python, "-I", "-S", str(agent)]),
        "SUPERVISE_INDEX__VOYAGE_API_KEY": VOYAGE,
        "OTHER": "not for you",
    }
    done = subprocess.run(
        command, user=NOBODY, group=NOBODY, extra_groups=[], cwd=public, env=env, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(json.loads(done.stdout.splitlines()[-1])["text"])
    assert len(seen["theirs"]) >= 2  # the supervising process, and what is between
    assert set(seen["theirs"]) == {"refused: Permission denied"}
    assert "OTHER" not in seen["mine"]
    assert VOYAGE not in done.stdout.decode()
    assert (public / ".local/state/supervise").stat().st_mode & 0o077 == 0


def test_without_hardening_the_environment_could_be_read(cli: Cli) -> None:
    """The detector works: root's agent reads what an ordinary user's cannot."""
    if os.geteuid() != 0:
        pytest.skip("an ordinary user's agent is refused, as it should be")
    seen = json.loads(cli.run("ask", env={"OTHER": "seen"}).out)
    assert "OTHER=seen" in seen["theirs"][-1]
    for between in seen["theirs"][:-1]:  # guardian and zygote: they have nothing that could be read
        assert "OTHER" not in between
    assert "OTHER" not in seen["mine"]


@pytest.mark.parametrize("words", [[], ["--json"], ["--log-format", "json"]], ids=["plain", "json", "log lines"])
def test_a_key_that_the_agent_prints_is_masked_in_every_sink(cli: Cli, words: list[str]) -> None:
    json_wanted = words == ["--json"]
    env = {"ANTHROPIC_API_KEY": KEY, "VOYAGE_API_KEY": VOYAGE}
    done = cli.run("tell", *words, env=env)
    assert done.code == 0
    text = done.result["text"] if json_wanted else done.out.rstrip("\n")
    assert text == "the key is ***"
    assert "I found *** in my environment" in (done.out if json_wanted else done.err)
    if words[:1] == ["--log-format"]:
        told = [json.loads(line)["event"] for line in done.err.splitlines()]
        assert "I found *** in my environment" in told
    check_nowhere(cli, done)
    logs = list(cli.state.rglob("*.log"))
    assert any(b"debug: the key is ***" in log.read_bytes() for log in logs)


def test_keys_go_to_whom_they_belong_only(cli: Cli) -> None:
    (cli.workspace / ".code-indexer").mkdir()
    env = {"ANTHROPIC_API_KEY": KEY, "VOYAGE_API_KEY": VOYAGE, "SUPERVISE_HTTP__TOKEN": "bearer-of-ours-42"}
    done = cli.run("ask", "--set", "index.command=/usr/bin/env", "--set", "index.reconcile_timeout=5", env=env)
    seen = json.loads(done.out)
    assert "VOYAGE_API_KEY" not in seen["mine"]
    assert not {name for name in seen["mine"] if name.startswith("SUPERVISE_")} - {"SUPERVISE_MARK"}
    check_nowhere(cli, done)


BUG = """
import logging
import sys
from supervise.agents.claude import ClaudeAgent
from supervise.cli import app, run
from supervise.job import nursery

def fail(*args, **kwargs):
    try:
        raise ValueError("with {key}")
    except ValueError:
        if logging.getLogger("supervise").handlers:
            logging.getLogger("supervise.job").exception("trouble with {voyage}")
    raise RuntimeError("a bug with {key} in its message and {voyage}")

{where} = fail
sys.exit(app.main(["run", "--job-id", "buggy", "--log-format", "{format}", "say hello"]))
"""


@pytest.mark.parametrize(
    ("where", "log_format"),
    [
        ("run.read_prompt", "console"),
        ("run.follow", "console"),
        ("run.follow", "json"),
        ("nursery.Parts.introduction", "console"),
    ],
)
def test_the_traceback_of_a_bug_is_masked_and_called_one(cli: Cli, where: str, log_format: str) -> None:
    file = cli.root / "supervise.toml"
    file.write_text(f'index.voyage_api_key = "{VOYAGE}"')  # the environment does not hold it
    script = BUG.format(where=where, key=KEY, voyage=VOYAGE, format=log_format).replace(
        '"run", ', f'"run", "--config", {str(file)!r}, '
    )
    env = {**cli.env, "ANTHROPIC_API_KEY": KEY, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=cli.workspace, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" in done.stderr
    assert "RuntimeError: a bug with *** in its message and ***" in done.stderr
    assert "a bug in supervise" in done.stderr
    if where != "run.read_prompt":  # that one is before there is a log
        assert "trouble with ***" in done.stderr
        assert "ValueError: with ***" in done.stderr
    if log_format == "json":
        logged = [json.loads(line) for line in done.stderr.splitlines()]  # and nothing else
        assert [line for line in logged if "ValueError: with ***" in line.get("exception", "")]
    assert KEY not in done.stderr
    assert VOYAGE not in done.stderr


def check_nowhere(cli: Cli, done: Done) -> None:
    """Neither key in what was printed, nor in any file of the home or the state directory."""
    for key in (KEY, VOYAGE):
        assert key not in done.out
        assert key not in done.err
        files = [path for path in cli.root.rglob("*") if path.is_file()]
        assert any(path.name == "result.json" for path in files)
        for path in files:
            assert key.encode() not in path.read_bytes(), path
