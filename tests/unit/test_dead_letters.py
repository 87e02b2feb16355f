"""Dead letters: found in order, tried again in one rename, dropped for good."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from supervise.dispatch.dead_letters import DeadLetters
from supervise.dispatch.spool import Spool
from supervise.errors import SuperviseError


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path, "w1")
    spool.create()
    Spool(tmp_path, "w2").create()
    return spool


def bury(root: Path, name: str, worker: str = "w1", raw: bytes | None = None, **fields: Any) -> Path:
    path = root / "dlq" / worker / f"{name}.json"
    path.write_text(json.dumps({"task_id": name.split("~")[0], "description": "x", **fields}))
    if raw is not None:
        path.with_suffix(".raw").write_bytes(raw)
    return path


def names(letters: DeadLetters) -> list[str]:
    return [letter.name for letter in letters.all()]


def test_the_oldest_comes_first_and_what_cannot_be_read_is_there_too(spool: Spool) -> None:
    bury(spool.root, "b", dlq_timestamp="2026-11-21T12:00:01Z")
    bury(spool.root, "a", dlq_timestamp="2026-11-21T12:00:02Z")
    bury(spool.root, "c", worker="w2", dlq_timestamp="2026-11-21T12:00:00Z")
    (spool.dlq / "torn.json").write_bytes(b"{")
    (spool.dlq / "list.json").write_bytes(b"[]")
    (spool.dlq / "odd.json").mkdir()
    (spool.dlq / ".a.json.01234567").write_bytes(b"{}")
    (spool.dlq / ".a.json").write_bytes(b"{}")
    (spool.dlq / "gone.json").symlink_to("nowhere")
    assert names(DeadLetters(spool.root)) == ["list", "odd", "torn", "c", "b", "a"]
    assert names(DeadLetters(spool.root, "w2")) == ["c"]
    assert [letter.record for letter in DeadLetters(spool.root).all()[:3]] == [{}, {}, {}]


@pytest.mark.parametrize("worker", ["w3", "", ".", "..", "../tasks", "../dlq/w1"])
def test_a_worker_is_one_of_those_that_are_there(spool: Spool, worker: str) -> None:
    with pytest.raises(SuperviseError, match=r"has run under .*; there are: w1, w2"):
        DeadLetters(spool.root, worker)


def test_a_name_goes_before_a_task_id(spool: Spool) -> None:
    bury(spool.root, "t1")
    bury(spool.root, "t1~2")
    bury(spool.root, "other", task_id="t2")
    letters = DeadLetters(spool.root)
    assert [letter.name for letter in letters.named(["t1"])] == ["t1"]
    assert [letter.name for letter in letters.named(["t2", "t1~2", "other"])] == ["other", "t1~2"]
    with pytest.raises(SuperviseError, match="there is no dead letter 'nobody'"):
        letters.named(["t1", "nobody"])


def test_one_of_several_workers_has_to_be_named(spool: Spool) -> None:
    bury(spool.root, "t1")
    bury(spool.root, "t1", worker="w2")
    with pytest.raises(SuperviseError, match=r"workers w1, w2 have dead letters 't1'; say which one"):
        DeadLetters(spool.root).named(["t1"])
    assert [letter.worker for letter in DeadLetters(spool.root, "w2").named(["t1"])] == ["w2"]


def test_what_goes_back_is_what_was_there(spool: Spool) -> None:
    record = bury(spool.root, "t1").read_bytes()
    bury(spool.root, "raw", raw=b"\xff")
    letters = DeadLetters(spool.root)
    paths = [letters.retry(letter) for letter in letters.named(["t1", "raw"])]
    assert [path.read_bytes() for path in paths] == [record, b"\xff"]
    assert {path.parent for path in paths} == {spool.tasks}
    assert all(path.suffix == ".json" for path in paths)
    assert os.listdir(spool.dlq) == []


def test_nothing_is_overwritten(spool: Spool) -> None:
    bury(spool.root, "t1")
    letters = DeadLetters(spool.root)
    (first,) = letters.all()
    taken = letters.retry(first)
    bury(spool.root, "t1", number=2)
    before = taken.read_bytes()
    (second,) = letters.all()
    with pytest.raises(SuperviseError, match="is there already"):
        letters.retry(second)
    assert taken.read_bytes() == before
    assert second.path.exists()


def test_one_that_somebody_else_has_seen_to_is_told(spool: Spool) -> None:
    bury(spool.root, "t1")
    bury(spool.root, "t2")
    letters = DeadLetters(spool.root)
    first, second = letters.all()
    first.path.unlink()
    with pytest.raises(SuperviseError, match=r"t1\.json is gone: somebody else has seen to"):
        letters.retry(first)
    letters.drop(first)
    letters.drop(second)
    assert names(letters) == []


def test_a_worker_whose_directory_is_gone_has_to_be_started_first(spool: Spool) -> None:
    bury(spool.root, "t1")
    spool.tasks.rmdir()
    letters = DeadLetters(spool.root)
    with pytest.raises(SuperviseError, match="start the worker w1 first"):
        letters.retry(letters.all()[0])
    assert names(letters) == ["t1"]


def test_a_directory_that_was_set_aside_is_not_removed(spool: Spool) -> None:
    bury(spool.root, "t1")
    (spool.dlq / "t1.raw").mkdir()
    letters = DeadLetters(spool.root)
    with pytest.raises(SuperviseError, match="is a directory; look what is in it"):
        letters.drop(letters.all()[0])
    assert names(letters) == ["t1"]


def test_a_root_without_dead_letters_is_told(tmp_path: Path) -> None:
    with pytest.raises(SuperviseError, match="no worker has run under this root"):
        DeadLetters(tmp_path)
    (tmp_path / "dlq").write_text("a file")
    with pytest.raises(SuperviseError, match="no worker has run under this root"):
        DeadLetters(tmp_path)
