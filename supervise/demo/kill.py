"""`--fault kill`: a supervising process is killed with -9 in mid-job, and its tree is watched as it empties."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import trio
from attrs import frozen

from supervise.codec import event_from_json, loads
from supervise.demo.scene import CANCEL_AFTER, Scene
from supervise.errors import SuperviseError
from supervise.events import AgentToolUse, Event
from supervise.model import StopPolicy
from supervise.processes import identity
from supervise.processes.child import Child, TreeOptions, open_tree
from supervise.processes.containment import Command
from supervise.processes.hurry import Hurry
from supervise.processes.output import Lines

#: How long the supervising process is waited for until its agent works, in seconds.
PATIENCE = 60.0

#: How long its tree may take to empty, in seconds beyond `orphan_grace`.
BOUND = 2.0


#: Of an event's line, in bytes.
LONGEST = 1 << 20


@frozen
class Mate:
    """A process below the one that is killed."""

    pid: int
    command: str


@frozen(kw_only=True)
class Kill:
    """What became of a supervising process and its tree.

    Attributes:
        pid: of the one that was killed.
        mates: what was alive below it.
        left: those of them that were still alive after the bound.
        seconds: from the kill to the end of the last one that has ended.
        bound: what was promised, in seconds.
    """

    pid: int
    mates: tuple[Mate, ...]
    left: tuple[Mate, ...]
    seconds: float
    bound: float


async def kill_in_mid_job(
    scene: Scene,
    *,
    hear: Callable[[Event], None],
    killed: Callable[[int, tuple[Mate, ...]], None],
    gone: Callable[[Mate, float], None],
) -> Kill:
    """Start a supervising process, kill it with -9 while its agent works, and watch who ends when.

    Args:
        scene: where its job runs.
        hear: gets the events of its job.
        killed: gets its pid, and who is alive below it at that moment.
        gone: gets each of them when it has ended, and the seconds since the kill.

    Raises:
        SuperviseError: it ended before its agent worked.

    Cancelling ends it and its tree. So does leaving: where nothing else can end them, this does.
    """
    used = 0
    enough = trio.Event()

    def listen(line: str) -> None:
        nonlocal used
        event = event_from_json(loads(line))
        hear(event)
        used += isinstance(event, AgentToolUse)
        if used == CANCEL_AFTER:
            enough.set()

    argv = (sys.executable, "-P", "-m", "supervise.demo.victim", str(scene.workspace), str(scene.settings.state_dir))
    command = Command(argv=argv, cwd=str(scene.workspace), env=dict(os.environ))
    options = TreeOptions(mark="demo")
    async with open_tree("supervisor", StopPolicy(), Hurry(), options=options, emit=lambda event: None) as tree:
        child = await tree.spawn(command, stdout=Lines(listen, LONGEST).feed)
        await _either(enough, child)
        if not enough.is_set():
            said = " ".join(child.tails()[1].split())
            raise SuperviseError(f"the supervising process did not come to its agent's work ({child.status}): {said}")
        below = identity.descendants(child.pid)
        mates = {process: Mate(process.pid, identity.command_of(process.pid)) for process in below if process.alive}
        os.kill(child.pid, signal.SIGKILL)  # a child of ours that is not reaped: the pid is its own
        began = trio.current_time()
        killed(child.pid, tuple(mates.values()))
        left, last = dict(mates), 0.0
        bound = scene.settings.orphan_grace + BOUND
        with trio.move_on_after(bound):
            while left:
                for process in list(left):
                    now = identity.read(process.pid)
                    if now is None or now.start != process.start or not now.alive:
                        last = trio.current_time() - began
                        gone(left.pop(process), last)
                await trio.sleep(0.005)
        return Kill(pid=child.pid, mates=tuple(mates.values()), left=tuple(left.values()), seconds=last, bound=bound)


async def _either(enough: trio.Event, child: Child) -> None:
    """Until the agent works, or the process has ended; at most `PATIENCE`."""

    async def end(nursery: trio.Nursery) -> None:
        await child.wait()
        nursery.cancel_scope.cancel()

    with trio.move_on_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end, nursery)
            await enough.wait()
            nursery.cancel_scope.cancel()
