"""The files of a worker, by example."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from supervise.dispatch.backlog import Offer
from supervise.dispatch.source import ClaimLost
from supervise.dispatch.spool import Bad, Gone, Half, Held, Spool
from supervise.dispatch.task import MAX_BYTES, Attempt


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    made = Spool(tmp_path, "w")
    made.create()
    return made


def put(spool: Spool, name: str = "x.json", **fields: object) -> Path:
    path = spool.tasks / name
    path.write_text(json.dumps({"task_id": "a", "description": "d", **fields}))
    return path


def taken(spool: Spool, name: str = "x.json") -> Held:
    held = spool.claim(name, "a")
    assert held is not None
    return held


def test_a_task_goes_from_directory_to_directory(spool: Spool) -> None:
    put(spool, priority=3, not_before=5)
    assert spool.look("x.json") == Offer(key="x.json", task_id="a", priority=3, not_before=5.0)
    held = taken(spool)
    assert os.listdir(spool.running) == ["a.json"]
    name = spool.retry(held, (Attempt(attempt=1),), 77.0, 7.0)
    assert name == "a~retry.json"
    again = Offer(key=name, task_id="a", priority=3, not_before=5.0, attempts=1, retry_at=77.0, pause=7.0)
    assert spool.look(name) == again
    held = taken(spool, name)
    assert held.attempts == (Attempt(attempt=1),)
    spool.finish(held, {"task_id": "a", "status": "completed"})
    assert (os.listdir(spool.running), os.listdir(spool.tasks)) == ([], [])
    assert spool.completed(["a", "b"]) == ({"a"}, None)


def test_what_may_be_a_task_by_its_name(spool: Spool) -> None:
    for name in ("a.json", ".a.json", "a.txt", "json"):
        put(spool, name)
    assert spool.names() == ["a.json"]


def test_our_own_files_come_first(spool: Spool) -> None:
    for number in range(20):
        put(spool, f"{number}.json")
    put(spool, "a~retry.json")
    assert spool.names()[0] == "a~retry.json"


def test_what_is_no_regular_file_is_refused_without_being_opened(spool: Spool) -> None:
    os.mkfifo(spool.tasks / "pipe.json")
    (spool.tasks / "link.json").symlink_to("/dev/zero")
    (spool.tasks / "directory.json").mkdir()
    (spool.tasks / "large.json").write_bytes(b" " * (MAX_BYTES + 1))
    for name, told in [
        ("pipe", "a pipe"),
        ("link", "a symbolic link"),
        ("directory", "a directory"),
        ("large", "larger"),
    ]:
        bad = spool.look(f"{name}.json")
        assert isinstance(bad, Bad)
        assert told in bad.reason
        spool.quarantine(bad, {})
        assert os.path.lexists(spool.dlq / f"{name}.raw")
        assert json.loads((spool.dlq / f"{name}.json").read_bytes())["file"] == f"{name}.raw"
    assert spool.names() == []


def test_gone_half_and_bad(spool: Spool) -> None:
    assert spool.look("x.json") == Gone("x.json")
    path = put(spool)
    path.write_bytes(path.read_bytes()[:-1])
    assert isinstance(spool.look("x.json"), Half)
    put(spool, worker="somebody else")
    found = spool.look("x.json")
    assert isinstance(found, Bad)
    assert found.task_id == "a"


def test_an_id_that_runs_or_has_a_result_is_taken_and_one_of_a_dead_letter_is_not(spool: Spool) -> None:
    put(spool)
    held = taken(spool)
    put(spool, "y.json")
    assert isinstance(spool.look("y.json"), Bad)
    spool.bury(held, {})
    assert isinstance(spool.look("y.json"), Offer)
    spool.finish(taken(spool, "y.json"), {"status": "completed"})
    put(spool, "z.json")
    assert isinstance(spool.look("z.json"), Bad)


@pytest.mark.parametrize("is_over", [True, False])
def test_a_second_task_of_an_id_that_was_looked_at_before_the_first_was_claimed_overwrites_nothing(
    spool: Spool, is_over: bool
) -> None:
    put(spool, "x.json")
    put(spool, "y.json", colour="red")
    assert isinstance(spool.look("x.json"), Offer)
    assert isinstance(spool.look("y.json"), Offer)
    held = taken(spool, "x.json")
    if is_over:
        spool.finish(held, {"status": "completed"})
    assert spool.claim("y.json", "a") is None
    assert os.listdir(spool.tasks) == ["y.json"]


def test_a_file_that_is_another_task_by_now_is_left_alone(spool: Spool) -> None:
    put(spool, task_id="b")
    assert spool.claim("x.json", "a") is None
    assert os.listdir(spool.tasks) == ["x.json"]
    assert spool.claim("gone.json", "a") is None


def test_a_claim_that_was_lost_publishes_nothing(spool: Spool) -> None:
    put(spool)
    held = taken(spool)
    (spool.running / "a.json").unlink()
    with pytest.raises(ClaimLost):
        spool.finish(held, {})
    assert os.listdir(spool.results) == []


@pytest.mark.parametrize("stranger", [".snapshot", ".nfs0000"])
def test_hidden_files_of_others_are_left_alone(spool: Spool, stranger: str) -> None:
    (spool.results / stranger).mkdir()
    (spool.tasks / ".x.json.1234abcd").touch()
    (spool.results / ".a.json.1234abcd").touch()
    assert list(spool.recover()) == []
    assert os.listdir(spool.results) == [stranger]
    assert os.listdir(spool.tasks) == [".x.json.1234abcd"]


def test_a_task_of_the_greatest_size_can_be_tried_again(spool: Spool) -> None:
    path = put(spool, filler="")
    put(spool, filler="x" * (MAX_BYTES - path.stat().st_size))
    assert path.stat().st_size == MAX_BYTES
    name = spool.retry(taken(spool), (Attempt(attempt=1),), 0.0)
    assert isinstance(spool.look(name), Offer)
    assert taken(spool, name).attempts == (Attempt(attempt=1),)


def test_a_trigger_is_written_once_and_a_heartbeat_each_time(spool: Spool) -> None:
    for number in (1, 2):
        spool.trigger("a", {"number": number})
        spool.beat({"number": number})
    assert json.loads((spool.triggers / "a.trigger").read_bytes()) == {"number": 1}
    assert json.loads(spool.heartbeat.read_bytes()) == {"number": 2}
