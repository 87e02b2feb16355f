"""The supervising processes of the chaos harness: `python -m benchmarks.chaos_supervisor SOCKET`.

This is their maker: it has imported everything, and forks one for each request, so that none costs an import. It is no
subreaper, and has one thread. A request is JSON with the supervising process's socket beside it; the answer is its pid.

A supervising process talks to the referee in JSON, too: it is asked to `open` a supervisor, to run a `job`, to
`cancel` it, to `leave` the supervisor's block, and to go (`bye`); it says what happens.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import trio

import supervise
from benchmarks import chaos_children
from supervise.agents.command import run_command
from supervise.agents.protocol import AgentRun
from supervise.agents.stream_json import StreamJsonParser
from supervise.events import Event, ProcessExited, ProcessStarted, SignalSent, TreeEmpty

#: Seconds. Short, so that a trial is; the referee's bounds are made of them.
ORPHAN_GRACE = 1.0
TERMINATION = 0.3
FLUSH = 0.3
GUARDIAN_TIMEOUT = 2.0
KILL_WAIT = 2.0

Message = dict[str, Any]


class ChaosAgent:
    """An agent whose program starts misbehaving children."""

    name = "chaos"

    def __init__(self, argv: tuple[str, ...]) -> None:
        self._argv = argv

    async def run(self, run: AgentRun) -> None:
        """See `Agent.run`."""
        await run_command(run, self._argv, StreamJsonParser(max_line=65536), stdin=b"")


def settings(order: Message, job: Message | None = None) -> supervise.Settings:
    """Those of all trials; the job says what its watch does."""
    command: tuple[str, ...] = ("true",)
    if job is not None:
        command = program(order, "cidx", job["watch"])
    return supervise.Settings(
        state_dir=Path(order["directory"], "state"),
        containment=order["tier"],
        orphan_grace=ORPHAN_GRACE,
        guardian_timeout=GUARDIAN_TIMEOUT,
        pipe_timeout=0.5,
        kill_wait=KILL_WAIT,
        agent=supervise.AgentSettings(termination_timeout=TERMINATION),
        index=supervise.IndexSettings(
            mode="cidx",
            command=command,
            assume_fresh=True,
            flush_timeout=FLUSH,
            termination_timeout=TERMINATION,
            command_timeout=2.0,
            reconcile_timeout=2.0,
        ),
    )


def program(order: Message, role: str, plan: Message) -> tuple[str, ...]:
    """A command line with the trial's token."""
    words = (sys.executable, "-I", "-S", chaos_children.__file__)
    return (*words, order["token"], order["directory"], role, json.dumps(plan))


class Talk:
    """The line to the referee."""

    def __init__(self, control: socket.socket) -> None:
        self._socket = trio.socket.from_stdlib_socket(control)

    async def hear(self) -> Message:
        """The next request. When the referee has gone, it asks for the end."""
        data = await self._socket.recv(65536)
        return json.loads(data) if data else {"op": "bye"}

    async def say(self, op: str, **more: object) -> None:
        """Tell the referee."""
        try:
            await self._socket.send(json.dumps({"op": op, "time": time.monotonic(), **more}).encode())
        except BrokenPipeError:  # it has gone, which `hear` will find out
            return


async def serve(order: Message, control: socket.socket) -> None:
    """One trial, as its supervising process sees it."""
    talk = Talk(control)
    await talk.say("here")
    while (await talk.hear())["op"] == "open":
        async with supervise.open_supervisor(settings=settings(order)) as sup:
            swept = sup.swept
            pids = [[each.pid, each.command] for each in swept.found]
            await talk.say("ready", tier=sup.containment, found=pids, survivors=len(swept.survivors))
            async with trio.open_nursery() as nursery:
                jobs: list[supervise.Job] = []
                while (request := await talk.hear())["op"] not in ("leave", "bye"):
                    if request["op"] == "job":
                        await nursery.start(run_job, sup, order, request, talk, jobs)
                    for job in jobs if request["op"] == "cancel" else ():
                        job.cancel("the referee wants it")
                for job in jobs:  # none, unless the referee has given up
                    job.cancel("the referee has gone")
        await talk.say("left")
        if request["op"] == "bye":
            return


async def run_job(
    sup: supervise.Supervisor,
    order: Message,
    request: Message,
    talk: Talk,
    jobs: list[supervise.Job],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """One job, from its beginning to its result."""
    agent = ChaosAgent(program(order, "agent", request["agent"]))
    spec = supervise.JobSpec(
        prompt="go",
        workspace=Path(order["directory"], "workspace"),
        agent=agent,
        index=settings(order, request).index,
    )
    async with sup.open_job(spec) as job, job.subscribe() as events:
        jobs.append(job)
        task_status.started()  # a cancel that comes at once finds it
        async for event in events:
            await tell(event, talk)
        result = await job.result()
    jobs.remove(job)
    survivors = [each.reason for each in result.survivors]
    await talk.say("done", outcome=result.outcome.value, survivors=survivors, error=result.error)


async def tell(event: Event, talk: Talk) -> None:
    """What the referee waits for."""
    if isinstance(event, ProcessStarted | ProcessExited | SignalSent | TreeEmpty):
        await talk.say(type(event).__name__, role=event.role)


def be_supervisor(order: Message, control: socket.socket) -> NoReturn:
    """A process of its own, just forked."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(Path(order["directory"], "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        logging.basicConfig(stream=sys.stderr, force=True)
        os.environ["LD_LIBRARY_PATH"] = f"{os.environ.get('LD_LIBRARY_PATH', '')}:/nowhere/{order['token']}".lstrip(":")
        trio.run(serve, order, control)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Fork one for each request, until the referee goes."""
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    gc.freeze()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 65536, 1)
        if not data:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            os.set_inheritable(descriptors[0], False)
            be_supervisor(json.loads(data), socket.socket(fileno=descriptors[0]))
        os.close(descriptors[0])
        control.send(json.dumps({"pid": pid}).encode())


if __name__ == "__main__":
    main()
