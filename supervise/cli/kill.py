"""What `demo --fault kill` shows: a supervising process dies, its tree empties, a stale mark stays."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, final

import trio
from rich.console import Console

from supervise.cli.signals import Signals
from supervise.cli.stdout import Stdout
from supervise.cli.view import follow, say, seen, tell
from supervise.codec import event_to_json, rfc3339, to_line
from supervise.demo.kill import Kill, Mate, kill_in_mid_job
from supervise.demo.scene import Scene
from supervise.events import Event

#: Events that wait to be shown. The demo has some hundred.
WAITING = 10_000


def is_as_promised(kill: Kill, mark: Path | None) -> bool:
    """Whether the tree is empty, and the mark says that the index may be behind."""
    return not kill.left and bool(kill.mates) and mark is not None


@final
class KillForPeople:
    """Shows it on a terminal, or as lines."""

    def __init__(self, people: Console) -> None:
        self._people = people
        self._events_in, self._events = trio.open_memory_channel[Event](WAITING)
        self._is_dead = False

    async def run(self, scene: Scene) -> bool:
        """Show it. Returns whether all was as promised."""
        async with trio.open_nursery() as nursery:
            shown = trio.Event()
            nursery.start_soon(self._follow, shown)
            kill = await kill_in_mid_job(scene, hear=self._hear, killed=self._killed, gone=lambda mate, seconds: None)
            await shown.wait()
        mark = (await scene.end()).mark
        self.tell(kill, mark)
        await seen(self._people)
        return is_as_promised(kill, mark)

    async def _follow(self, shown: trio.Event) -> None:
        await follow(self._events, self._people, "the nursery of a supervising process of its own")
        shown.set()

    def _hear(self, event: Event) -> None:
        if not self._is_dead:  # else it is what was still in the pipe
            self._events_in.send_nowait(event)

    def _killed(self, pid: int, mates: tuple[Mate, ...]) -> None:
        """Nothing more comes: its picture ends here."""
        self._is_dead = True
        self._events_in.close()

    def tell(self, kill: Kill, mark: Path | None) -> None:
        """Say what became of the tree, and of the mark."""
        names = ", ".join(f"{mate.pid} {mate.command}" for mate in kill.mates)
        tell(self._people, f"kill -9 {kill.pid}: the supervising process is gone. Below it were alive: {names}", "bold")
        if kill.left:
            names = ", ".join(f"{mate.pid} {mate.command}" for mate in kill.left)
            text = f"after {kill.bound:g} s these were still alive, and ended by the demo: {names}"
            tell(self._people, text, "bold red")
        else:
            count, took = len(kill.mates), f"{kill.seconds:.2f} s (at most {kill.bound:g} s)"
            text = f"the tree is empty: all {count} ended within {took}"
            tell(self._people, text, "bold green")
        if mark is None:
            tell(self._people, "no stale mark is on the disk: this is a bug in supervise", "bold red")
        else:
            text = "the stale mark is on the disk: nobody knows whether the index saw the last edits"
            tell(self._people, text, "yellow")
            say(self._people, str(mark), "dim")
        tell(self._people, "now another job in the same workspace:", "bold")


@final
class KillAsJson:
    """Writes it as lines of JSON: the events, then `supervisor_killed`, `process_gone` for each, `tree_emptied`."""

    def __init__(self, signals: Signals) -> None:
        self._stdout = Stdout(1, signals.pipe_closed)
        self._lines_in, self._lines = trio.open_memory_channel[dict[str, Any]](math.inf)

    async def run(self, scene: Scene) -> bool:
        """Write it. Returns whether all was as promised."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            with self._lines_in:
                kill = await kill_in_mid_job(
                    scene,
                    hear=lambda event: self._lines_in.send_nowait(event_to_json(event)),
                    killed=self._killed,
                    gone=lambda mate, seconds: self._say("process_gone", **_mate(mate), seconds=seconds),
                )
                mark = (await scene.end()).mark
                self._say(
                    "tree_emptied",
                    seconds=kill.seconds,
                    bound=kill.bound,
                    left=[_mate(mate) for mate in kill.left],
                    stale_mark=mark is not None,
                )
        return is_as_promised(kill, mark)

    async def _write(self) -> None:
        async for line in self._lines:
            await self._stdout.write(to_line(line))

    def _killed(self, pid: int, mates: tuple[Mate, ...]) -> None:
        self._say("supervisor_killed", pid=pid, processes=[_mate(mate) for mate in mates])

    def _say(self, kind: str, **fields: Any) -> None:
        self._lines_in.send_nowait({"type": kind, "time": rfc3339(time.time()), **fields})


def _mate(mate: Mate) -> dict[str, Any]:
    return {"pid": mate.pid, "command": mate.command}
