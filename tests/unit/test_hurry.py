"""Waits that somebody else can end."""

from __future__ import annotations

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from supervise.processes.hurry import Hurry


async def took(hurry: Hurry, seconds: float, into: list[float]) -> None:
    began = trio.current_time()
    with hurry.step(seconds):
        await trio.sleep_forever()
    into.append(trio.current_time() - began)


async def test_a_step_ends_by_itself(autojump_clock: MockClock) -> None:
    times: list[float] = []
    await took(Hurry(), 10, times)
    assert times == [10]


async def test_a_step_whose_work_is_done_is_over(autojump_clock: MockClock) -> None:
    hurry = Hurry()
    with hurry.step(10) as scope:
        await trio.sleep(3)
    assert trio.current_time() == 3
    assert not scope.cancelled_caught
    hurry.next()
    times: list[float] = []
    await took(hurry, 10, times)  # nobody waited: the next step is skipped
    await took(hurry, 10, times)  # and only that
    assert times == [0, 10]


async def test_next_ends_all_that_wait_now(autojump_clock: MockClock) -> None:
    hurry = Hurry()
    times: list[float] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(took, hurry, 10, times)
        nursery.start_soon(took, hurry, 20, times)
        await trio.sleep(4)
        hurry.next()
    assert times == [4, 4]
    await took(hurry, 10, times)
    assert times == [4, 4, 10]


async def test_each_next_that_comes_early_skips_one_step(autojump_clock: MockClock) -> None:
    hurry = Hurry()
    hurry.next()
    hurry.next()
    times: list[float] = []
    for _ in range(3):
        await took(hurry, 10, times)
    assert times == [0, 0, 10]


async def test_two_at_once_end_this_step_and_the_next(autojump_clock: MockClock) -> None:
    hurry = Hurry()
    times: list[float] = []

    async def steps() -> None:
        for _ in range(3):
            await took(hurry, 10, times)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(steps)
        await wait_all_tasks_blocked()
        hurry.next()
        hurry.next()  # the first step's task has not run since
    assert times == [0, 0, 10]


async def test_a_step_that_raises_waits_no_more(autojump_clock: MockClock) -> None:
    hurry = Hurry()
    try:
        with hurry.step(10):
            raise ValueError
    except ValueError:
        hurry.next()
    times: list[float] = []
    await took(hurry, 10, times)
    assert times == [0]


async def test_cancelling_from_outside_comes_through(autojump_clock: MockClock) -> None:
    with trio.move_on_after(2) as outer, Hurry().step(10) as inner:
        await trio.sleep_forever()
    assert outer.cancelled_caught
    assert not inner.cancelled_caught
