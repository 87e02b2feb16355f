"""The lock of a single instance between real processes: killed, signalled, many at once.

Run as a program, it is such a process: `python test_instance.py ACTION PATH [OPTION …]`.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import trio

from supervise.dispatch.instance import Holder, InstanceLock, hold, parse, render, take
from supervise.errors import AlreadyRunning

if __name__ != "__main__":  # it takes as long to import as all else
    import pytest

LOCK = "worker.lock"
LIMIT = 20.0  # seconds for anything that is waited for
ROOT = Path(__file__).parents[2]


# --- the other side ----------------------------------------------------------------------------------------


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def worker(path: Path, timeout: float) -> None:
    """Holds it until it is signalled."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with hold(path, timeout=timeout):
            say("held")
            await anext(aiter(signals))


def run_worker(path: Path, timeout: str = "0") -> None:
    try:
        trio.run(worker, path, float(timeout))
    except AlreadyRunning as error:
        sys.exit(str(error))


def run_parent(path: Path) -> None:
    """Holds it, and has a child that would hold on whatever it inherits."""
    lock = take(path)
    child = subprocess.Popen(["sleep", str(LIMIT)], close_fds=False)
    say("held", child.pid)
    signal.pause()
    lock.release()


def start_contenders(count: int, contend: Callable[[], None]) -> list[int]:
    """Fork them, and let them all go at the same time."""
    ready, go = os.pipe()
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            signal.alarm(int(LIMIT))
            os.close(go)
            os.read(ready, 1)
            try:
                contend()
            finally:
                os._exit(1)
        pids.append(pid)
    os.close(ready)
    os.close(go)
    return pids


def run_crowd(path: Path, count: str, rounds: str) -> None:
    """Several at the same time; in every other round the winner is killed instead of ending."""
    for number in range(int(rounds)):
        crowd_once(path, int(count), number, kill=number % 2 == 1)


def crowd_once(path: Path, count: int, number: int, *, kill: bool) -> None:
    results, report = os.pipe()
    ended, end = os.pipe()

    def contend() -> None:
        os.close(end)
        try:
            lock = take(path)
        except AlreadyRunning as error:
            os.write(report, f"lost {error.pid}\n".encode())
            os._exit(0)
        os.write(report, f"won {os.getpid()}\n".encode())
        os.read(ended, 1)
        lock.release()
        os._exit(0)

    pids = start_contenders(count, contend)
    os.close(report)
    said = b""
    while said.count(b"\n") < len(pids) and (data := os.read(results, 4096)):
        said += data
    lines = sorted(said.decode().split("\n")[:-1])
    assert lines[-1].startswith("won"), lines  # never kill a process that is only named
    winner = int(lines[-1].split()[1])
    assert winner in pids
    if kill:
        os.kill(winner, signal.SIGKILL)
    os.close(end)
    for pid in pids:
        os.waitpid(pid, 0)
    os.close(results)
    os.close(ended)
    say(number, path.exists(), lines.count(f"won {winner}"), lines.count(f"lost {winner}"))


def run_churn(path: Path, count: str, rounds: str) -> None:
    """Several that take and release as fast as they can. Who has it makes a witness that nobody else may have made."""
    witness = path.with_name("witness")

    def contend() -> None:
        for _ in range(int(rounds)):
            lock = taken_in_the_end()
            os.close(os.open(witness, os.O_CREAT | os.O_EXCL))
            assert lock.is_intact
            os.unlink(witness)
            lock.release()
        os._exit(0)

    def taken_in_the_end() -> InstanceLock:
        while True:  # the alarm ends it
            try:
                return take(path)
            except AlreadyRunning:
                os.sched_yield()

    pids = start_contenders(int(count), contend)
    say([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], path.exists(), witness.exists())


ACTIONS: dict[str, Callable[..., None]] = {
    "worker": run_worker,
    "parent": run_parent,
    "crowd": run_crowd,
    "churn": run_churn,
}

# --- this side ---------------------------------------------------------------------------------------------


@contextmanager
def program(*arguments: object, before: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [*before, sys.executable, __file__, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as popen:
        try:
            yield popen
        finally:
            popen.kill()


def heard(popen: subprocess.Popen[bytes]) -> str:
    """The next line that it says."""
    assert popen.stdout is not None
    line, end = b"", time.monotonic() + LIMIT
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([popen.stdout], [], [], max(0.0, end - time.monotonic()))
        data = os.read(popen.stdout.fileno(), 1) if ready else b""
        assert data, f"{line!r}, and no more; {popen.stderr.read() if popen.stderr and ready else b''!r}"
        line += data
    return line.decode().strip()


def killed(popen: subprocess.Popen[bytes]) -> None:
    """Dead, but not reaped."""
    popen.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)


def taken(path: Path) -> None:
    """It is ours at once."""
    lock = take(path)
    holder = parse(path.read_bytes())
    assert holder is not None
    assert holder.pid == os.getpid()
    lock.release()
    assert not path.exists()


def refused(path: Path, pid: int) -> None:
    with pytest.raises(AlreadyRunning, match=rf"already running \(PID {pid}\)"):
        take(path)


def test_who_is_killed_is_succeeded_at_once(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    with program("worker", path) as holder:
        assert heard(holder) == "held"
        refused(path, holder.pid)
        killed(holder)
        named = parse(path.read_bytes())
        assert named is not None
        assert named.pid == holder.pid
        taken(path)  # while it is a zombie
        path.write_bytes(render(named))
        holder.wait()
        taken(path)  # and when it is gone


def test_what_a_file_says_of_a_living_process_decides(tmp_path: Path) -> None:
    """It has no lock: the file was its, and was put back by somebody."""
    path = tmp_path / LOCK
    with program("worker", path) as holder:
        assert heard(holder) == "held"
        named = parse(path.read_bytes())
        assert named is not None
        assert named.start is not None
        other = path.with_name("other.lock")
        for living in (named, Holder(named.pid)):
            other.write_bytes(render(living))
            refused(other, holder.pid)
        for dead in (attrs.evolve(named, start=named.start - 1), attrs.evolve(named, boot="another")):
            other.write_bytes(render(dead))  # its pid is another process's by now
            taken(other)


def test_two_at_the_same_time_are_one(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    with program("worker", path) as one, program("worker", path) as two:
        assert one.stdout is not None
        assert two.stdout is not None
        ready, _, _ = select.select([one.stdout, two.stdout], [], [], LIMIT)
        has_said = {popen: popen.stdout in ready and popen.stdout.readline() == b"held\n" for popen in (one, two)}
        winner, loser = (one, two) if has_said[one] else (two, one)
        _, told = loser.communicate(timeout=LIMIT)
        assert loser.returncode == 1
        assert f"already running (PID {winner.pid})" in told.decode()
        refused(path, winner.pid)


def test_who_is_terminated_leaves_no_file_and_the_next_one_has_waited(tmp_path: Path) -> None:
    succeeded(tmp_path / LOCK, signal.SIGTERM)


def test_who_is_interrupted_leaves_no_file_and_the_next_one_has_waited(tmp_path: Path) -> None:
    succeeded(tmp_path / LOCK, signal.SIGINT)


def succeeded(path: Path, number: signal.Signals) -> None:
    with program("worker", path) as holder:
        assert heard(holder) == "held"
        with program("worker", path, LIMIT) as waiting:
            refused(path, holder.pid)
            holder.send_signal(number)
            assert holder.wait(LIMIT) == 0
            assert heard(waiting) == "held"
            refused(path, waiting.pid)
            waiting.send_signal(number)
            assert waiting.wait(LIMIT) == 0
    assert not path.exists()


def test_a_child_of_the_dead_does_not_keep_it(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    with program("parent", path) as parent:
        child = int(heard(parent).split()[1])
        try:
            killed(parent)
            assert Path(f"/proc/{child}/comm").read_text() == "sleep\n"
            taken(path)
        finally:
            os.kill(child, signal.SIGKILL)


def test_of_twenty_at_the_same_time_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    with program("crowd", path, 20, 4) as crowd:
        for number in range(4):
            was_killed = bool(number % 2)
            assert heard(crowd) == f"{number} {was_killed} 1 19"
        assert crowd.wait(LIMIT) == 0


def test_those_who_come_and_go_all_the_time_never_meet(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    with program("churn", path, 6, 40) as churn:
        assert heard(churn) == f"{[0] * 6} False False"
        assert churn.wait(LIMIT) == 0


def test_who_holds_it_in_a_container_keeps_it_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    apart = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if subprocess.run([*apart, "true"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("a pid namespace takes rights that we do not have")
    with program("worker", path, before=apart) as container:
        assert heard(container) == "held"
        named = parse(path.read_bytes())
        assert named is not None
        assert named.pid == 1  # which is another process here, and lives
        with pytest.raises(AlreadyRunning) as caught:
            take(path)
        inside = caught.value.pid  # as it is called here
        assert inside is not None
        assert inside != 1
        with program("worker", path, before=apart) as second:  # it sees neither of the two
            _, told = second.communicate(timeout=LIMIT)
            assert "already running (PID 1)" in told.decode()
        pidfd = os.pidfd_open(inside)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], LIMIT)[0]
        os.close(pidfd)
        assert path.read_bytes() == render(named)
        taken(path)


if __name__ == "__main__":
    ACTIONS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
