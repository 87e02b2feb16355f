"""After each test here: no process, no descriptor and no zombie is left of it."""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.workers import Files

#: In the environment of whatever a test starts.
TOKEN = "SUPERVISE_TEST_TOKEN"


class Leaks:
    """What there is more of than when this was made."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self._descriptors = _descriptors()
        self._zombies = _zombies()

    def processes(self) -> list[int]:
        """Living processes, other than this one, that were started with the token."""
        return [pid for pid in _pids() if pid != os.getpid() and self.token.encode() in _read(pid, "environ")]

    def descriptors(self) -> list[str]:
        """What this process has open now and had not before."""
        return sorted((_descriptors() - self._descriptors).elements())

    def zombies(self) -> list[int]:
        """Children that have ended and were not reaped."""
        return sorted(_zombies() - self._zombies)

    def found(self) -> list[str]:
        """All leaks, in words."""
        return [
            *(f"process {pid}: {_read(pid, 'cmdline').replace(bytes(1), b' ')!r}" for pid in self.processes()),
            *(f"descriptor: {target}" for target in self.descriptors()),
            *(f"zombie {pid}" for pid in self.zombies()),
        ]

    def settle(self, seconds: float = 5.0) -> list[str]:
        """What is still leaked after `seconds`; returns as soon as there is nothing."""
        end = time.monotonic() + seconds
        while (found := self.found()) and time.monotonic() < end:
            time.sleep(0.01)
        return found


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:  # it is gone
        return b""


def _descriptors() -> Counter[str]:
    targets: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        try:
            targets[os.readlink(f"/proc/self/fd/{name}")] += 1
        except FileNotFoundError:  # the one that listed them
            continue
    return targets


def _zombies() -> set[int]:
    found = set()
    for pid in _pids():
        fields = _read(pid, "stat").rpartition(b") ")[2].split()
        if fields[:1] == [b"Z"] and int(fields[1]) == os.getpid():
            found.add(pid)
    return found


@pytest.fixture(autouse=True)
def leaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Leaks]:
    """The detector; its token is in `os.environ`, and belongs into the environment of each command."""
    leaks = Leaks()
    monkeypatch.setenv(TOKEN, leaks.token)
    yield leaks
    found = leaks.settle()
    for pid in leaks.processes():
        os.kill(pid, signal.SIGKILL)
    assert not found, "left behind: " + "; ".join(found)


@pytest.fixture
def root() -> Iterator[Path]:
    """Of a worker; in memory if that can be had: each task is on the disk several times before it has ended."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Path(path)


@pytest.fixture
def files(root: Path) -> Files:
    return Files(root)
