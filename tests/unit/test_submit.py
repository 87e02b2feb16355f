"""A task is handed in whole, or not at all."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from supervise.dispatch.spool import Spool
from supervise.dispatch.submit import outcome_of, submit, workers_of
from supervise.errors import BadInput, SuperviseError

FIELDS: dict[str, Any] = {"task_id": "t1", "description": "x"}


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path, "w1")
    spool.create()
    return spool


def test_what_was_handed_in_is_there_whole_and_alone(spool: Spool) -> None:
    fields = {**FIELDS, "metadata": {"a": "\udcff", "b": [1, None]}, "own": "kept"}
    path = submit(spool.root, "w1", fields)
    assert path == spool.tasks / "t1.json"
    assert json.loads(path.read_bytes()) == fields
    assert os.listdir(spool.tasks) == ["t1.json"]
    assert path.stat().st_nlink == 1


@pytest.mark.parametrize("worker", ["", ".", "..", "a/b", "../w1", ".hidden", "w\n1", 3])
def test_a_worker_has_a_plain_name(spool: Spool, worker: Any) -> None:
    with pytest.raises(BadInput, match="a worker's name is"):
        submit(spool.root, worker, FIELDS)
    with pytest.raises(BadInput, match="a worker's name is"):
        outcome_of(spool.root, worker, "t1")


@pytest.mark.parametrize("task_id", ["", "..", "a/b", "*"])
def test_a_task_has_a_plain_id(spool: Spool, task_id: str) -> None:
    with pytest.raises(BadInput):
        submit(spool.root, "w1", {**FIELDS, "task_id": task_id})
    with pytest.raises(BadInput, match="a task's id is"):
        outcome_of(spool.root, "w1", task_id)
    with pytest.raises(BadInput, match="a task's id is"):
        workers_of(spool.root, task_id)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_json_would_make_null_of_is_refused(spool: Spool, number: float) -> None:
    with pytest.raises(BadInput, match="timeout is"):
        submit(spool.root, "w1", {**FIELDS, "timeout": number})
    assert os.listdir(spool.tasks) == []


def test_what_is_too_large_is_refused(spool: Spool) -> None:
    with pytest.raises(BadInput, match="larger than 1048576 bytes"):
        submit(spool.root, "w1", {**FIELDS, "description": "x" * 1024 * 1024})
    assert os.listdir(spool.tasks) == []


def test_of_two_at_the_same_moment_one_is_refused(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    meet = threading.Barrier(2, timeout=10)
    link = os.link

    def both(*args: Any) -> None:  # both have seen that the id is free
        meet.wait()
        link(*args)

    monkeypatch.setattr(os, "link", both)
    told: list[str] = []

    def hand_in(words: str) -> None:
        try:
            submit(spool.root, "w1", {**FIELDS, "description": words})
        except SuperviseError as error:
            told.append(f"{words}: {error}")
        else:
            told.append(words)

    threads = [threading.Thread(target=hand_in, args=(words,)) for words in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    accepted, refused = sorted(told, key=len)
    assert "the task id 't1' is taken" in refused
    assert json.loads((spool.tasks / "t1.json").read_bytes())["description"] == accepted
    assert os.listdir(spool.tasks) == ["t1.json"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_hard_links_will_do(spool: Spool, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    submit(spool.root, "w1", FIELDS)
    assert os.listdir(spool.tasks) == ["t1.json"]


def test_a_full_disk_is_told_and_leaves_nothing_behind(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(SuperviseError, match=r"cannot be written to .*/tasks/w1: No space left on device"):
        submit(spool.root, "w1", FIELDS)
    assert os.listdir(spool.tasks) == []


def test_the_outcome_is_the_result_or_the_dead_letter(spool: Spool) -> None:
    assert outcome_of(spool.root, "w1", "t1") is None
    assert workers_of(spool.root, "t1") == []
    submit(spool.root, "w1", FIELDS)
    assert workers_of(spool.root, "t1") == ["w1"]
    assert outcome_of(spool.root, "w1", "t1") is None
    (spool.dlq / "t1.json").write_bytes(b'{"dlq_reason": "auth"}')
    assert outcome_of(spool.root, "w1", "t1") == {"dlq_reason": "auth"}
    (spool.results / "t1.json").write_bytes(b"[]")
    assert outcome_of(spool.root, "w1", "t1") == {"dlq_reason": "auth"}
    (spool.results / "t1.json").write_bytes(b'{"status": "completed"}')
    assert outcome_of(spool.root, "w1", "t1") == {"status": "completed"}


def test_what_cannot_be_read_is_told(spool: Spool) -> None:
    (spool.results / "t1.json").mkdir()
    with pytest.raises(SuperviseError, match=r"results/w1/t1\.json cannot be read: Is a directory"):
        outcome_of(spool.root, "w1", "t1")
    assert workers_of(spool.root / "tasks" / "w1" / "nothing", "t1") == []
