"""The benchmarks of the worker run, with numbers too small to measure anything."""

from __future__ import annotations

import importlib.util

from benchmarks.worker import Numbers, measure

FEW = Numbers(drops=3, idle=1.2, tasks=5, rounds=1, places=(2,), queues=(("file", 1),))


def test_drops_are_measured_from_the_rename_to_the_claim() -> None:
    rows = measure(FEW, ["drops"])
    assert len(rows) == 2
    for row in rows:
        assert all("p50" in side and "p50 0.00" not in side for side in (row.ours, row.peer)), row


def test_an_idle_worker_wakes_up_less_often_than_one_that_polls() -> None:
    (row,) = measure(FEW, ["idle"])
    ours, polling = int(row.ours.split(";")[0]), int(row.peer.split(" ")[0])
    assert 0 <= ours < polling, row


def test_the_rates_of_tasks_are_told_beside_those_of_the_peers() -> None:
    rows = measure(FEW, ["rates"])
    assert len(rows) == (2 if importlib.util.find_spec("huey") is None else 3)
    for row in rows:
        assert float(row.ours.split(" ")[0]) > 0, row
        assert float(row.peer.split(" ")[0]) > 0, row
    assert [row.budget for row in rows[:2]] == ["≥ 0.5 ×", "none set"]
