"""The leak detector is shown a leak of each kind and finds it."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.processes.conftest import TOKEN, Leaks

SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]


def test_nothing_leaked_is_nothing_found(leaks: Leaks) -> None:
    assert leaks.found() == []
    assert os.environ[TOKEN] == leaks.token


def test_a_living_process_is_found(leaks: Leaks) -> None:
    process = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        assert leaks.processes() == [process.pid]
        assert [text for text in leaks.found() if str(process.pid) in text]
        assert leaks.settle(0.05)
    finally:
        process.kill()
        process.wait()
    assert leaks.found() == []


def test_an_orphan_is_found(leaks: Leaks) -> None:
    shell = f"'{sys.executable}' -I -S -c 'import time; time.sleep(60)' >/dev/null 2>&1 & echo $!"
    orphan = int(subprocess.run(["sh", "-c", shell], capture_output=True, check=True, start_new_session=True).stdout)
    try:
        assert leaks.processes() == [orphan]
    finally:
        os.kill(orphan, 9)
    assert leaks.settle() == []


def test_a_process_of_somebody_else_is_not_found(leaks: Leaks) -> None:
    process = subprocess.Popen(SLEEP, env={**os.environ, TOKEN: "another"})
    try:
        assert leaks.processes() == []
    finally:
        process.kill()
        process.wait()


def test_a_zombie_is_found(leaks: Leaks) -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        assert leaks.zombies() == [process.pid]
        assert leaks.found() == [f"zombie {process.pid}"]
    finally:
        process.wait()
    assert leaks.found() == []


def test_a_descriptor_is_found(leaks: Leaks) -> None:
    descriptor = os.open("/dev/null", os.O_RDONLY)
    again = os.dup(descriptor)
    read, write = os.pipe()
    try:
        assert leaks.descriptors()[:2] == ["/dev/null", "/dev/null"]
        assert len(leaks.descriptors()) == 4
    finally:
        for each in (descriptor, again, read, write):
            os.close(each)
    assert leaks.found() == []


def test_what_goes_by_itself_is_waited_for(leaks: Leaks) -> None:
    subprocess.run(["sh", "-c", "sleep 0.2 >/dev/null 2>&1 &"], check=True)
    assert leaks.settle() == []
