"""What a worker is measured against, each in a process of its own: `python -m benchmarks.worker_peers MODE DIRECTORY`.

`claim` waits on inotify and renames what comes from tasks/ to running/, in a loop without Trio. `write COUNT` writes
files that stay: write, fsync, rename, fsync of the directory. `steps COUNT` does one after another all that a task
needs: claim (rename, fsync of both directories), result (as `write`), removal. `huey KIND WORKERS COUNT` runs huey's
consumer with threads over tasks that do nothing and whose results are kept.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

TASK = b'{"task_id": "%s", "description": "do nothing, and say so in a few words"}'
RESULT = b'{"task_id":"t00000","worker":"w1","status":"completed"' + b',"field":"0123456789"' * 30 + b"}\n"


def claim(root: Path) -> None:
    """Until killed, or until the standard input ends."""
    import inotify_simple

    tasks, running = root / "tasks", root / "running"
    for path in (tasks, running):
        path.mkdir()
    watch = inotify_simple.INotify()
    watch.add_watch(os.fspath(tasks), inotify_simple.flags.MOVED_TO)
    threading.Thread(target=_end_with_input, daemon=True).start()
    os.write(1, b"ready\n")
    while True:
        for event in watch.read():
            name = event.name
            os.rename(tasks / name, running / name)
            sync(tasks)
            sync(running)
            os.write(1, f"claimed {name.removesuffix('.json')} {time.monotonic_ns()}\n".encode())
            os.unlink(running / name)
            os.write(1, f"finished {name.removesuffix('.json')}\n".encode())


def _end_with_input() -> None:
    os.read(0, 1)
    os._exit(0)


def sync(directory: Path) -> None:
    """Its names are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)


def publish(path: Path) -> None:
    """A file that stays."""
    new = path.with_suffix(".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    os.write(descriptor, RESULT)
    os.fsync(descriptor)
    os.close(descriptor)
    os.rename(new, path)
    sync(path.parent)


def write(root: Path, count: str) -> None:
    """Says how many seconds it took."""
    results = root / "results"
    results.mkdir()
    began = time.perf_counter()
    for number in range(int(count)):
        publish(results / f"t{number:05}.json")
    os.write(1, f"{time.perf_counter() - began}\n".encode())


def steps(root: Path, count: str) -> None:
    """Likewise."""
    tasks, running, results = (root / name for name in ("tasks", "running", "results"))
    for path in (tasks, running, results):
        path.mkdir()
    for number in range(int(count)):
        (tasks / f"t{number:05}.json").write_bytes(TASK % b"t")
    began = time.perf_counter()
    for name in sorted(os.listdir(tasks)):
        os.rename(tasks / name, running / name)
        sync(tasks)
        sync(running)
        (running / name).read_bytes()
        publish(results / name)
        os.unlink(running / name)
    os.write(1, f"{time.perf_counter() - began}\n".encode())


def huey(root: Path, kind: str, workers: str, count: str) -> None:
    """Likewise, from the consumer's start until the last result is kept."""
    from huey import FileHuey, SqliteHuey, signals

    queue = FileHuey(path=os.fspath(root / "huey")) if kind == "file" else SqliteHuey(filename=root / "huey.db")
    ended = 0
    lock = threading.Lock()
    over = threading.Event()

    @queue.task()
    def nothing() -> int:
        return 1  # None would not be kept

    @queue.signal(signals.SIGNAL_COMPLETE)
    def note(signal: str, task: object) -> None:
        nonlocal ended
        with lock:
            ended += 1
            if ended == int(count):
                over.set()

    for _ in range(int(count)):
        nothing()
    consumer = queue.create_consumer(workers=int(workers), worker_type="thread", periodic=False)
    began = time.perf_counter()
    consumer.start()
    assert over.wait(600), f"{ended} of {count} tasks ended"
    seconds = time.perf_counter() - began
    assert queue.storage.result_store_size() == int(count)
    os.write(1, f"{seconds}\n".encode())
    consumer.stop(graceful=True)


if __name__ == "__main__":
    mode, root, *more = sys.argv[1:]
    {"claim": claim, "write": write, "steps": steps, "huey": huey}[mode](Path(root), *more)
