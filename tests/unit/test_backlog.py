"""Which task is next."""

from __future__ import annotations

import pytest

from supervise.dispatch.backlog import MOST_TOLD, Backlog, Offer


def offer(name: str, **more: object) -> Offer:
    return Offer(key=f"{name}.json", task_id=name, **more)  # type: ignore[arg-type]  # whatever a test says


def drained(backlog: Backlog, now: float = 0.0) -> list[str]:
    found: list[str] = []
    while (each := backlog.next(now)) is not None:
        backlog.remove(each.key)
        found.append(each.task_id)
    return found


def test_higher_priority_first_then_arrival() -> None:
    backlog = Backlog()
    for name, priority in [("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)]:
        backlog.add(offer(name, priority=priority))
    assert drained(backlog) == ["b", "d", "a", "c", "e"]


def test_it_stays_until_it_is_removed() -> None:
    backlog = Backlog()
    backlog.add(offer("a"))
    assert backlog.next(0) is backlog.next(0) is not None
    assert "a.json" in backlog
    assert backlog.remove("a.json") == offer("a")
    assert backlog.remove("a.json") is None
    assert (len(backlog), backlog.next(0), backlog.next_time()) == (0, None, None)


def test_a_delayed_one_waits_for_its_time_and_takes_its_place_by_arrival() -> None:
    backlog = Backlog()
    backlog.add(offer("late", not_before=10.0))
    backlog.add(offer("now"))
    assert drained(backlog, 9.9) == ["now"]
    assert backlog.next_time() == 10.0
    backlog.add(offer("new"))
    assert drained(backlog, 10.0) == ["late", "new"]


def test_the_time_of_one_that_is_gone_is_nobodys() -> None:
    backlog = Backlog()
    backlog.add(offer("a", not_before=10.0))
    backlog.add(offer("b", not_before=20.0))
    backlog.remove("a.json")
    assert backlog.next_time() == 20.0


def test_a_blocked_one_waits_for_all_of_its_dependencies() -> None:
    backlog = Backlog()
    backlog.add(offer("a", priority=9), missing=["x", "y"])
    backlog.add(offer("b"))
    assert backlog.blocked == {"a": ("x", "y")}
    backlog.completed("x")
    backlog.completed("nobody waits for this")
    assert backlog.next(0) == offer("b")
    backlog.completed("y")
    assert drained(backlog) == ["a", "b"]


def test_a_blocked_one_that_was_removed_does_not_come_back() -> None:
    backlog = Backlog()
    backlog.add(offer("a"), missing=["x"])
    backlog.remove("a.json")
    backlog.completed("x")
    assert backlog.next(0) is None
    assert backlog.blocked == {}


def test_another_offer_of_the_same_key_replaces_the_first() -> None:
    backlog = Backlog()
    backlog.add(offer("a", priority=9))
    backlog.add(offer("b"))
    backlog.add(offer("a", priority=-9))
    assert len(backlog) == 2
    assert drained(backlog) == ["b", "a"]


def test_what_was_removed_takes_no_room_for_ever() -> None:
    backlog = Backlog()
    for number in range(10_000):
        backlog.add(offer("a", not_before=float(number)))
    assert len(backlog._ready) + len(backlog._delayed) < 100


def test_one_that_goes_back_takes_its_place_again() -> None:
    backlog = Backlog()
    for name in ("a", "b", "c"):
        backlog.add(offer(name))
    arrival = backlog.arrival("b.json")
    backlog.remove("b.json")
    backlog.add(offer("b"), arrival=arrival)
    backlog.add(offer("d"))
    assert drained(backlog) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("names", ["ab", "abc", "abcdefgh"])
def test_those_that_wait_for_each_other_are_found_when_the_last_one_comes(names: str) -> None:
    backlog = Backlog()
    pairs = [*zip(names, names[1:] + names[0], strict=True)]
    for name, other in pairs:
        assert backlog.circles == ()
        backlog.add(offer(name), missing=[other, "z"])
    (circle,) = backlog.circles
    assert sorted(circle) == sorted(names)
    assert {*zip(circle, circle[1:] + circle[:1], strict=True)} == {*pairs}


@pytest.mark.parametrize("leaves", [True, False])
def test_a_circle_that_is_broken_is_none(leaves: bool) -> None:
    backlog = Backlog()
    backlog.add(offer("a"), missing=["b"])
    backlog.add(offer("b"), missing=["a"])
    if leaves:
        backlog.remove("a.json")
    else:
        backlog.completed("a")
    assert backlog.circles == ()


def test_a_chain_and_a_diamond_are_no_circles() -> None:
    backlog = Backlog()
    for name, missing in [("d", "bc"), ("c", "a"), ("b", "a"), ("a", "z")]:
        backlog.add(offer(name), missing=[*missing])
    assert backlog.circles == ()


def test_a_search_for_circles_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervise.dispatch.backlog.MOST_STEPS", 5)
    backlog = Backlog()
    for name, other in ("ab", "bc", "cd", "de", "ef", "fg", "ga"):
        backlog.add(offer(name), missing=[other])
    assert backlog.circles == ()


def test_a_hundred_of_the_blocked_are_told_of() -> None:
    backlog = Backlog()
    for number in range(MOST_TOLD + 50):
        backlog.add(offer(f"t{number}"), missing=["x"])
    assert len(backlog.blocked) == MOST_TOLD == 100
