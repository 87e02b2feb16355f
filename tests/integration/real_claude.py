"""What tests need to run the real Claude CLI: the program, a place of its own, and eyes for what is left."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import attrs
import pytest
import trio
from attrs import Factory, frozen

import supervise
from supervise.events import Event
from tests.integration.messages_stub import DUMMY_KEY, MessagesStub

#: Names the CLI to test with; without it, `claude` is looked for on the PATH.
CLI_VARIABLE = "TEST_CLAUDE_CLI"

#: The version whose ways these tests know.
VERSION = "2.1.329"

#: Keeps the CLI from everything but its work.
QUIET = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_TELEMETRY": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
}


def installed_cli(home: Path) -> str:
    """The CLI's path. Skips the test where there is none, or one of another version.

    Args:
        home: an empty directory: the CLI writes into its home even when asked for its version.
    """
    named = os.environ.get(CLI_VARIABLE)
    path = shutil.which(named or "claude")
    if path is None:
        where = f"{CLI_VARIABLE} is {named!r}, which is no program" if named else "no `claude` on the PATH"
        pytest.skip(f"{where}: set {CLI_VARIABLE} to Claude Code {VERSION}")
    try:
        done = subprocess.run(
            [path, "--version"],
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(home), **QUIET},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"`{path} --version` does not answer: {error}")
    if done.stdout.split()[:1] != [VERSION]:
        pytest.skip(f"`{path} --version` says {done.stdout.partition(chr(10))[0]!r}: these tests know {VERSION}")
    return path


def scrub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take from this process's environment what would lead the CLI away from the test's place."""
    for name in os.environ:
        upper = name.upper()
        if upper.startswith(("ANTHROPIC_", "CLAUDE", "XDG_")) or upper.endswith("_PROXY"):
            monkeypatch.delenv(name)


@frozen
class Desk:
    """A place of its own for the CLI. All that it and the library write is under `root`.

    Attributes:
        mark: a text that every process of the desk's jobs has in its environment.
    """

    cli: str
    root: Path
    mark: str = Factory(lambda: uuid4().hex)

    def __attrs_post_init__(self) -> None:
        for folder in (self.workspace, self.home, self.root / "tmp"):
            folder.mkdir()

    @property
    def workspace(self) -> Path:
        return self.root / "ws"

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def settings(self) -> supervise.Settings:
        """A short grace, for tests in which a process ignores SIGTERM."""
        agent = supervise.AgentSettings(termination_timeout=1.0)
        return supervise.Settings(state_dir=self.root / "state", agent=agent)

    def environment(self, stub: MessagesStub, *, max_retries: int | None = None) -> dict[str, str]:
        """What the CLI is told by its environment."""
        retries = {} if max_retries is None else {"CLAUDE_CODE_MAX_RETRIES": str(max_retries)}
        return {
            "HOME": str(self.home),
            "CLAUDE_CONFIG_DIR": str(self.home / ".claude"),
            "TMPDIR": str(self.root / "tmp"),
            "CLAUDE_CODE_TMPDIR": str(self.root / "tmp"),
            "ANTHROPIC_BASE_URL": stub.url,
            "ANTHROPIC_API_KEY": DUMMY_KEY,
            "TEST_JOB_MARK": self.mark,
            **QUIET,
            **retries,
        }

    def spec(
        self,
        stub: MessagesStub,
        prompt: str = "Do the thing.",
        *,
        max_retries: int | None = None,
        timeout: float = 60.0,
        **agent: Any,
    ) -> supervise.JobSpec:
        """A job without an index. `agent` are options of the `ClaudeAgent`; Bash is allowed unless they differ."""
        options = {"allowed_tools": ("Bash",), **agent}
        return supervise.JobSpec(
            prompt=prompt,
            workspace=self.workspace,
            index=None,
            timeout=timeout,
            env=self.environment(stub, max_retries=max_retries),
            agent=supervise.ClaudeAgent(command=(self.cli,), **options),
        )

    async def run(self, spec: supervise.JobSpec) -> tuple[supervise.JobResult, list[Event]]:
        """Run the job to its end, at most a minute, and look for what it must not leave: see `check`."""
        with trio.fail_after(60):
            async with supervise.open_job(spec, settings=self.settings) as job, job.subscribe() as events:
                seen = [event async for event in events]
            result = await job.result()
        self.check(result, seen)
        return result, seen

    def check(self, result: supervise.JobResult, events: list[Event]) -> None:
        """No process of the job is alive, and the key is in nothing that the library told or wrote."""
        left = processes_with(self.mark)
        assert not left, f"alive after the job's end: {left}"
        assert not result.survivors, f"survivors: {result.survivors}"
        assert DUMMY_KEY not in repr(attrs.asdict(result)), "the key is in the result"
        telling = [event.type for event in events if DUMMY_KEY in repr(attrs.asdict(event))]
        assert not telling, f"events that tell the key: {telling}"
        holding = files_with(DUMMY_KEY, self.settings.state_dir)
        assert not holding, f"files that hold the key: {holding}"


def processes_with(mark: str) -> dict[int, list[str]]:
    """Pid and arguments of each living process that has `mark` in its arguments or its environment."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            arguments = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            environment = b""  # it has ended, or is another user's
        if mark.encode() in arguments + environment:
            found[int(folder.name)] = arguments.decode(errors="replace").rstrip("\0").split("\0")
    return found


def files_with(text: str, root: Path) -> list[Path]:
    """The files under `root` that hold `text`."""
    files = (path for path in root.rglob("*") if path.is_file())
    return [path for path in files if text.encode() in path.read_bytes()]


async def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` holds. The bound is the caller's."""
    while not condition():
        await trio.sleep(0.02)
