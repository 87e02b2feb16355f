"""The demo's scene: a scratch git repository, a real small indexer, a scripted agent that really edits files.

Only indexer and agent are stand-ins; whatever supervises them is what supervises the real ones.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import trio
from attrs import frozen

from supervise.agents.mock import MockAgent
from supervise.demo.project import lay_down
from supervise.demo.proof import Proof, proof
from supervise.errors import SpawnError, SuperviseError
from supervise.index.stale import DiskMark
from supervise.model import JobSpec, StopPolicy
from supervise.processes.child import TreeOptions, open_tree
from supervise.processes.containment import Command
from supervise.processes.hurry import Hurry
from supervise.settings import AgentSettings, IndexSettings, Settings

PROMPT = "Split orchard/util.py by what it is about, and rename docs to manual."

FAULTS = {
    "watch-start": "the watch cannot start: a reconcile takes its place, at the start and at the end",
    "watch-crash": "the watch crashes whenever it sees an edit: it is restarted, and at the end not trusted",
    "stubborn": "the watch ignores SIGINT and SIGTERM, and so does a child that has left its session",
    "reconcile": "neither watch nor reconcile work: the index is told to be stale, on disk, for the next job",
    "kill": "the supervising process is killed with -9: its tree empties, and the next job settles the stale mark",
    "cancel": "the job is cancelled while the agent works: the watch flushes, or the index is marked stale",
}

#: With `--fault cancel`, the job is cancelled when the agent has used so many tools.
CANCEL_AFTER = 5


@frozen
class End:
    """What is left behind: the index against the files, and the stale mark.

    Attributes:
        proof: index and files, digest by digest.
        mark: the stale mark on the disk, or `None`.
    """

    proof: Proof
    mark: Path | None

    @property
    def as_promised(self) -> bool:
        """The index equals the files, or is known not to."""
        return self.mark is not None or self.proof.equal


@frozen
class Scene:
    """A place to run the demo's job in.

    Attributes:
        workspace: the scratch repository.
        settings: with the demo's programs in the place of the real ones.
        about: what the workspace is, in words.
    """

    workspace: Path
    settings: Settings
    about: str

    def spec(self) -> JobSpec:
        """The demo's job."""
        return demo_spec(self.workspace)

    def next_spec(self) -> JobSpec:
        """Another job in the same workspace, after one that was killed: its agent only says a word."""
        agent = MockAgent(steps=("I only looked. The index was levelled before I began.",), text="looked")
        return JobSpec(prompt="Look around.", workspace=self.workspace, timeout=30, agent=agent)

    async def end(self) -> End:
        """Look at what a job has left behind. Cancelling waits for the look under way."""
        mark = DiskMark(self.settings.state_dir, self.workspace, lambda: None).directory / "stale.json"
        return End(await trio.to_thread.run_sync(proof, self.workspace), mark if mark.exists() else None)


async def set_up(scratch: Path, fault: str | None) -> Scene:
    """Make the scene in the empty directory `scratch`.

    Raises:
        SuperviseError: git or the indexer failed.
    """
    workspace = scratch / "orchard"
    workspace.mkdir()
    lay_down(workspace)
    settings = demo_settings(scratch / "state", fault)
    about = await _prepare(workspace, settings.index.command)
    return Scene(workspace, settings, about)


def demo_spec(workspace: Path) -> JobSpec:
    """The demo's job, in a workspace that was laid down."""
    return JobSpec(prompt=PROMPT, workspace=workspace, timeout=30)


def demo_settings(state_dir: Path, fault: str | None) -> Settings:
    """Settings that put the demo's programs in the place of the real ones."""
    # -P: without it, Python would look for modules in the workspace first, which the agent writes.
    python = (sys.executable, "-P", "-m")
    indexer = (
        *python,
        "supervise.demo.indexer",
        *(("--fault", fault) if fault not in (None, "cancel", "kill") else ()),
    )
    return Settings(
        state_dir=state_dir,
        heartbeat_interval=1.0,
        agent=AgentSettings(command=(*python, "supervise.demo.agent"), termination_timeout=2.0),
        index=IndexSettings(
            mode="cidx", command=indexer, startup_timeout=10.0, flush_timeout=2.0, termination_timeout=1.0
        ),
    )


async def _prepare(workspace: Path, indexer: tuple[str, ...]) -> str:
    """Make a git repository (where there is git) and an empty index of the workspace."""
    await _command(workspace, (*indexer, "init"))
    identity = ("-c", "user.name=demo", "-c", "user.email=demo@localhost", "-c", "commit.gpgsign=false")
    try:
        await _command(workspace, ("git", "init", "--quiet"))
        await _command(workspace, ("git", "add", "--all"))
        await _command(workspace, ("git", *identity, "commit", "--quiet", "--message", "The orchard"))
    except SpawnError:
        return "a plain directory, for there is no git here"
    return "a scratch git repository"


async def _command(workspace: Path, argv: tuple[str, ...]) -> None:
    command = Command(argv=argv, cwd=str(workspace), env=dict(os.environ))
    options = TreeOptions(mark="demo")
    async with open_tree("demo", StopPolicy(), Hurry(), options=options, emit=lambda event: None) as tree:
        child = await tree.spawn(command)
        with trio.move_on_after(30):
            await child.wait()
    if child.status is None or not child.status.ok:
        said = " ".join("\n".join(child.tails()).split())
        raise SuperviseError(f"the demo's preparation failed: {shlex.join(argv)}: {child.status}: {said}")
