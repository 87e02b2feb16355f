"""Spawn, wait, stop: a tree of processes as an async context manager. Nothing else starts a process.

    async with open_tree(role="agent", …) as tree:
        child = await tree.spawn(command, stdout=sink)
        status = await child.wait()
    # here no process of the tree is alive; tree.survivors tells of exceptions

Every road out of the block, be it the end of the child, an exception or a cancellation, leads through
`Tree.stop`: there is no second teardown.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol, final

import trio
from attrs import field, frozen

from supervise.errors import SpawnError
from supervise.events import (
    Event,
    OutputTruncated,
    ProcessExited,
    ProcessStarted,
    SignalSent,
    TreeEmpty,
)
from supervise.model import ExitStatus, StopPolicy, Survivor
from supervise.processes import identity
from supervise.processes.containment import Command, Containment, Leader, Pipes
from supervise.processes.hurry import Hurry
from supervise.processes.identity import Process
from supervise.processes.output import Logs, Output
from supervise.processes.program import spawn_error
from supervise.processes.session import SessionContainment
from supervise.secrets import Masker

READ_SIZE = 64 * 1024

#: How much of that is handed on before others have their turn: it may be a thousand lines, each an event.
FED_AT_ONCE = 8 * 1024

#: How often SIGKILL is sent again to a tree that keeps forking while it dies, in seconds.
KILL_AGAIN = 0.1

Sink = Callable[[bytes], None]


@frozen(kw_only=True)
class TreeOptions:
    """What all trees of one job share.

    Attributes:
        mark: the beginning of the environment marker, the job's id.
        masker: hides the job's secrets in whatever the children print.
        logs: where full output goes; `None` for nowhere. Closed by whoever has opened them.
        tail_bytes, pipe_timeout: as in `Settings`.
        contain: makes the containment of one tree from its marker.
    """

    mark: str
    masker: Masker = field(factory=Masker)
    logs: Logs | None = None
    tail_bytes: int = 64 * 1024
    pipe_timeout: float = 5.0
    contain: Callable[[str], Containment] = SessionContainment


class Child(Protocol):
    """A program that was started in a tree."""

    @property
    def pid(self) -> int: ...

    @property
    def status(self) -> ExitStatus | None:
        """How it ended, or None while it runs."""

    async def wait(self) -> ExitStatus:
        """Wait until it has ended, whatever its descendants do. Cancelling ends the wait only."""

    async def drained(self) -> None:
        """Wait until its output is read to the end. Cancelling ends the wait only."""

    def tails(self) -> tuple[str, str]:
        """The end of its standard output and of its standard error."""

    def interrupt(self) -> None:
        """Send SIGINT to its process group, as Ctrl-C in a terminal does."""


class Tree(Protocol):
    """What holds the processes that belong together."""

    @property
    def survivors(self) -> tuple[Survivor, ...]:
        """Processes that could not be ended. Known when the tree was left."""

    async def spawn(self, command: Command, *, stdout: Sink | None = None, stderr: Sink | None = None) -> Child:
        """Start a program in the tree.

        Args:
            command: the program.
            stdout, stderr: called with each chunk of output, secrets masked. They must not raise.

        Raises:
            SpawnError: it could not be started, or the tree is being ended.

        Cancelling waits for a spawn that is under way.
        """

    def alive(self) -> int:
        """How many processes of the tree are alive now."""

    async def stop(self) -> None:
        """End the whole tree now. Leaving the block does this, too. Not cancellable; bounded by the policy."""


class TreeOpener(Protocol):
    """What drivers are given to start processes with: `open_tree`, or a fake of it in a test."""

    def __call__(self, role: str, policy: StopPolicy, hurry: Hurry) -> AbstractAsyncContextManager[Tree]: ...


@asynccontextmanager
@trio.lowlevel.enable_ki_protection  # Ctrl-C comes at a wait, never between a fork and its bookkeeping
async def open_tree(
    role: str, policy: StopPolicy, hurry: Hurry, *, options: TreeOptions, emit: Callable[[Event], None]
) -> AsyncIterator[ProcessTree]:
    """A tree of processes; leaving the block ends it by `policy`.

    Args:
        role: what the tree is for: `agent`, `watch` …; it names events and logs.
        policy: how the tree is ended.
        hurry: lets somebody skip the graces.
        options: what the trees of a job share.
        emit: gets the events.

    Leaving waits until no process of the tree is alive (bounded by the policy, not cancellable), and its output
    is read to the end (at most `pipe_timeout` longer). An exception of the block leaves it unwrapped. A Ctrl-C that
    comes meanwhile goes on to the policy's next step.
    """
    containment = options.contain(f"{options.mark}:{role}:{secrets.token_hex(8)}")
    error: BaseException | None = None
    tree: ProcessTree | None = None
    try:
        async with trio.open_nursery() as nursery:
            tree = ProcessTree(role, policy, hurry, options, emit, containment, nursery)
            tree._start(containment.serve)
            try:
                yield tree
            except BaseException as exc:  # raised again below, outside of the nursery, so that it is not wrapped
                error = exc
            # In a task of its own: a KeyboardInterrupt breaks every wait of the main task, shielded or not.
            ended = trio.Event()
            nursery.start_soon(tree._end, ended)
            while not ended.is_set():
                try:
                    with trio.CancelScope(shield=True):
                        await ended.wait()
                except KeyboardInterrupt as exc:
                    error = exc
                    hurry.next()
    finally:
        containment.close(survivors=bool(tree and tree.survivors))
    if error is not None:
        raise error


@final
class ProcessTree:
    """A `Tree` of real processes."""

    def __init__(
        self,
        role: str,
        policy: StopPolicy,
        hurry: Hurry,
        options: TreeOptions,
        emit: Callable[[Event], None],
        containment: Containment,
        nursery: trio.Nursery,
    ) -> None:
        self.role = role
        self.survivors: tuple[Survivor, ...] = ()
        self._policy = policy
        self._hurry = hurry
        self._options = options
        self._emit = emit
        self._containment = containment
        self._nursery = nursery
        self._children: list[ProcessChild] = []
        self._tasks: list[trio.CancelScope] = []
        self._ending = 0
        self._spawning: set[trio.Event] = set()

    @trio.lowlevel.enable_ki_protection
    async def spawn(self, command: Command, *, stdout: Sink | None = None, stderr: Sink | None = None) -> ProcessChild:
        """See `Tree.spawn`."""
        if self._ending:
            name = command.argv[0]
            raise SpawnError(name, "other", f"the program {name!r} was not started: its tree is being ended")
        done = trio.Event()
        self._spawning.add(done)
        try:
            return await self._spawn(command, stdout, stderr)
        finally:
            self._spawning.discard(done)
            done.set()

    async def _spawn(self, command: Command, stdout: Sink | None, stderr: Sink | None) -> ProcessChild:
        ours: list[int] = []
        theirs: list[int] = []
        try:
            for _ in range(3):
                mine, other = _pipe()
                ours.append(mine)
                theirs.append(other)
            # Standard input is written by us and read by the child: the other way round than the outputs.
            ours[0], theirs[0] = theirs[0], ours[0]
            with trio.CancelScope(shield=True):
                leader = await self._containment.spawn(
                    command, Pipes(stdin=theirs[0], stdout=theirs[1], stderr=theirs[2])
                )
        except OSError as error:
            _close_all(ours)
            raise spawn_error(command, error) from None
        except BaseException:
            _close_all(ours)
            raise
        finally:
            _close_all(theirs)
        child = ProcessChild(self, leader, ours, [self._output("stdout", stdout), self._output("stderr", stderr)])
        self._children.append(child)
        self._emit(ProcessStarted(role=self.role, pid=leader.pid, program=os.path.basename(command.argv[0])))
        self._start(child._watch)
        self._start(child._feed, command.stdin)
        for index in (0, 1):
            self._start(child._read, index)
        return child

    def _start(self, work: Callable[..., Awaitable[None]], *args: object) -> None:
        """A task that goes on during the teardown, so that the pipes are drained, and ends with the tree."""
        scope = trio.CancelScope(shield=True)
        self._tasks.append(scope)
        self._nursery.start_soon(_shielded, scope, work, *args)

    def alive(self) -> int:
        """See `Tree.alive`."""
        return len(self._containment.members())

    @property
    def tier(self) -> str:
        """What holds the tree together."""
        return self._containment.tier

    def members(self) -> list[Process]:
        """The living processes of the tree."""
        return self._containment.members()

    async def stop(self) -> None:
        """See `Tree.stop`. The one teardown of this library."""
        began = trio.current_time()
        self._ending += 1
        try:
            with trio.CancelScope(shield=True):
                for done in list(self._spawning):  # a program that is just started belongs to the tree, too
                    await done.wait()
                survivors = await self._end_all_there_is()
        finally:
            self._ending -= 1
        self.survivors = survivors
        if self._children:
            self._emit(TreeEmpty(role=self.role, seconds=trio.current_time() - began, survivors=len(survivors)))

    async def _end_all_there_is(self) -> tuple[Survivor, ...]:
        try:
            ended = await self._end_all() or self._containment.empty()
            left = [] if ended else self._containment.members()
        except OSError as error:
            return await self._end_unseen(error)
        survivors = [self._survivor(process) for process in left]
        if not ended and not left:
            survivors.append(
                Survivor(0, 0.0, "?", self.role, "it lives on, hidden from us: /proc shows no process of it")
            )
        told = {process.pid for process in left}
        leaders = [child for child in self._children if child.pid not in told]
        # The end of each leader is told before its tree is called empty.
        with trio.move_on_after(KILL_AGAIN):
            await self._ended(leaders)
        with trio.move_on_after(self._policy.kill_wait):
            for child in leaders:
                if child.status is None:  # /proc hides it from us
                    self._containment.signal_group(child.pid, signal.SIGKILL)
            await self._ended(leaders)
        survivors += [self._leader_left(child, "its end was not seen") for child in leaders if child.status is None]
        return tuple(survivors)

    async def _ended(self, children: list[ProcessChild]) -> None:
        for child in children:
            await child.wait()

    async def _end_unseen(self, error: OSError) -> tuple[Survivor, ...]:
        """Nobody can be found, but the leaders' groups are known. Looks again until `kill_wait` is over."""
        with trio.move_on_after(self._policy.kill_wait):
            self._emit(SignalSent(role=self.role, signal="SIGKILL", count=len(self._children)))
            while True:
                for child in self._children:
                    self._containment.signal_group(child.pid, signal.SIGKILL)
                await trio.sleep(KILL_AGAIN)
                try:
                    if self._containment.empty():
                        await self._ended(self._children)
                        return ()
                    self._containment.signal(signal.SIGKILL)
                except OSError as again:
                    error = again
        # Also of a leader that has ended: what it left behind may live.
        return tuple(self._leader_left(child, f"could not look: {error.strerror}") for child in self._children)

    async def _end_all(self) -> bool:
        """Walk through the policy. Returns whether nothing is left."""
        for number, grace in self._policy.steps:
            if self._containment.empty():
                return True
            self._signal(number)
            with self._hurry.step(grace):
                await self._until_empty()
                return True
        with trio.move_on_after(self._policy.kill_wait):
            while not self._containment.empty():
                self._signal(signal.SIGKILL)
                with trio.move_on_after(KILL_AGAIN):
                    await self._until_empty()
            return True
        return False

    async def _until_empty(self) -> None:
        await trio.lowlevel.checkpoint()  # other trees signal meanwhile: one look then serves all
        while not self._containment.empty():
            await self._containment.change()
            await trio.lowlevel.checkpoint()

    def _signal(self, number: int) -> None:
        count = self._containment.signal(number)
        self._emit(SignalSent(role=self.role, signal=signal.Signals(number).name, count=count))

    def _survivor(self, process: Process) -> Survivor:
        reason = self._containment.not_ours().get(process.pid, f"it did not end after SIGKILL (state {process.state})")
        return Survivor(process.pid, process.start_time, identity.command_of(process.pid), self.role, reason)

    def _leader_left(self, child: ProcessChild, reason: str) -> Survivor:
        return Survivor(child.pid, child.started, identity.command_of(child.pid), self.role, reason)

    def _output(self, stream: str, sink: Sink | None) -> Output:
        logs = self._options.logs
        log = None if logs is None else logs.of(self.role, stream, lambda reason: self._cut(stream, reason))
        return Output(mask=self._options.masker.stream(), tail_bytes=self._options.tail_bytes, log=log, sink=sink)

    def _cut(self, stream: str, reason: str) -> None:
        self._emit(OutputTruncated(role=self.role, stream=stream, reason=reason))

    @trio.lowlevel.enable_ki_protection
    async def _end(self, ended: trio.Event) -> None:
        """All that leaving the block does."""
        self._ending += 1  # for ever
        try:
            with trio.CancelScope(shield=True):
                await self.stop()
                with trio.move_on_after(self._options.pipe_timeout):  # a stranger may hold the pipes
                    await self._drained()
                self._cancel_tasks()
                await self._drained()
        finally:
            self._cancel_tasks()
            ended.set()

    async def _drained(self) -> None:
        for child in self._children:
            await child.drained()

    def _cancel_tasks(self) -> None:
        for scope in self._tasks:
            scope.cancel()


@final
class ProcessChild:
    """A `Child` that is a real process."""

    def __init__(self, tree: ProcessTree, leader: Leader, pipes: list[int], outputs: list[Output]) -> None:
        self.pid = leader.pid
        self.status: ExitStatus | None = None
        self.started = time.time()
        self._tree = tree
        self._leader = leader
        self._stdin = trio.lowlevel.FdStream(pipes[0])
        self._sources = [trio.lowlevel.FdStream(descriptor) for descriptor in pipes[1:]]
        self._outputs = outputs
        self._ended = trio.Event()
        self._read_to_end = [trio.Event(), trio.Event()]

    async def wait(self) -> ExitStatus:
        """See `Child.wait`."""
        await self._ended.wait()
        assert self.status is not None
        return self.status

    async def drained(self) -> None:
        """See `Child.drained`."""
        for event in self._read_to_end:
            await event.wait()

    def tails(self) -> tuple[str, str]:
        """See `Child.tails`."""
        return self._outputs[0].tail(), self._outputs[1].tail()

    def interrupt(self) -> None:
        """See `Child.interrupt`."""
        if self.status is None:
            self._tree._containment.signal_group(self.pid, signal.SIGINT)
            self._tree._emit(SignalSent(role=self._tree.role, signal="SIGINT", count=1))

    async def _watch(self) -> None:
        self.status = await self._leader.wait()
        self._ended.set()
        self._tree._emit(
            ProcessExited(role=self._tree.role, pid=self.pid, exit_code=self.status.code, signal=self.status.signal)
        )

    async def _feed(self, data: bytes) -> None:
        async with self._stdin:
            try:
                await self._stdin.send_all(data)
            except trio.BrokenResourceError:
                return  # the child does not read its input: its own affair

    async def _read(self, index: int) -> None:
        source, output = self._sources[index], self._outputs[index]
        try:
            while chunk := await source.receive_some(READ_SIZE):
                for start in range(0, len(chunk), FED_AT_ONCE):
                    output.feed(chunk[start : start + FED_AT_ONCE])
                    await trio.lowlevel.cancel_shielded_checkpoint()
        except trio.Cancelled:
            stream = ("stdout", "stderr")[index]
            self._tree._cut(stream, "a process outside of the tree holds the pipe; reading was given up")
            raise
        finally:
            source.close()
            output.close()
            self._read_to_end[index].set()


@trio.lowlevel.enable_ki_protection
async def _shielded(scope: trio.CancelScope, work: Callable[..., Awaitable[None]], *args: object) -> None:
    with scope:
        await work(*args)


def _pipe() -> tuple[int, int]:
    """(our end: read, the child's end: write); neither is inherited by accident."""
    return os.pipe2(os.O_CLOEXEC)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


__all__ = ["Child", "Command", "ProcessTree", "SpawnError", "Tree", "TreeOpener", "TreeOptions", "open_tree"]
