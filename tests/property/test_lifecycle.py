"""The tables of the watch: whole, closed, and without a dead end; the endings and the restarts by plain models."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervise.errors import IllegalTransition
from supervise.index.lifecycle import (
    ENDS,
    FINAL,
    LEAVES_MARK,
    LIVE_STATUS,
    TABLE,
    Event,
    Facts,
    RestartBudget,
    State,
    ending,
    next_state,
)
from supervise.model import IndexStatus

# --- the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_every_state_and_event_is_in_the_table_or_an_error_that_names_both(state: State, event: Event) -> None:
    if (state, event) in TABLE:
        assert next_state(state, event) is TABLE[state, event]
        return
    with pytest.raises(IllegalTransition) as caught:
        next_state(state, event)
    assert repr(state.value) in str(caught.value)
    assert repr(event.value) in str(caught.value)
    assert (caught.value.state, caught.value.event) == (state.value, event.value)


def test_the_table_speaks_of_states_and_events_only() -> None:
    assert all(type(target) is State for target in TABLE.values())
    assert {state for state, _ in TABLE} == set(State)
    assert {event for _, event in TABLE} == set(Event)
    assert set(LIVE_STATUS) == set(State)


def after(state: State) -> set[State]:
    """All states that can follow, in one step or more."""
    seen: set[State] = set()
    todo = {state}
    while todo:
        here = todo.pop()
        new = {target for (source, _), target in TABLE.items() if source is here} - seen
        seen |= new
        todo |= new
    return seen


ALL_BUT_THE_FIRST = set(State) - {State.NOT_STARTED}


@pytest.mark.parametrize(
    ("state", "ends"),
    [
        (State.NOT_STARTED, {State.TERMINATED, State.FAILED}),
        (State.STARTING, {State.TERMINATED, State.FAILED}),
        (State.RUNNING, {State.TERMINATED, State.FAILED}),
        (State.STOPPING, {State.TERMINATED, State.FAILED}),
        (State.FAILED, {State.TERMINATED, State.FAILED}),
        (State.FALLBACK_RECONCILE, {State.TERMINATED, State.FAILED}),
        (State.TERMINATED, {State.TERMINATED, State.FAILED}),
    ],
)
def test_from_each_state_both_good_and_bad_ends_can_be_reached(state: State, ends: set[State]) -> None:
    assert after(state) & FINAL == ends
    assert after(state) == ALL_BUT_THE_FIRST  # and nothing leads back to knowing nothing


def test_there_is_no_dead_end() -> None:
    """Whatever runs can come to rest, and can do so in one step."""
    for state in set(State) - FINAL:
        assert {target for (source, _), target in TABLE.items() if source is state} & FINAL, state


@pytest.mark.parametrize("state", [State.STARTING, State.RUNNING, State.STOPPING, State.FALLBACK_RECONCILE])
def test_beside_something_that_runs_nothing_else_is_started(state: State) -> None:
    assert (state, Event.START) not in TABLE
    assert (state, Event.RECONCILE) not in TABLE


def test_level_is_only_what_has_been_proved() -> None:
    ways = {(source, event) for (source, event), target in TABLE.items() if target is State.TERMINATED}
    assert ways == {(State.STOPPING, Event.FLUSHED), (State.FALLBACK_RECONCILE, Event.RECONCILED)}


@settings(deadline=None)
@given(st.lists(st.sampled_from(Event), max_size=30))
def test_any_word_of_events_walks_within_the_table(word: list[Event]) -> None:
    state = State.NOT_STARTED
    for event in word:
        try:
            state = next_state(state, event)
        except IllegalTransition:
            assert (state, event) not in TABLE
    assert state in State


# --- the endings -------------------------------------------------------------------------------------------

facts = st.builds(
    Facts,
    index=st.booleans(),
    alone=st.booleans(),
    locked_out=st.booleans(),
    level_before=st.booleans(),
    ready_in_time=st.booleans(),
    crashes=st.integers(0, 4),
    errors=st.integers(0, 3),
    flushed=st.booleans(),
    cancelled=st.booleans(),
    fallback=st.booleans(),
    reconcile_on_cancel=st.booleans(),
)


def plain_ending(f: Facts) -> tuple[bool, IndexStatus]:
    """(whether to reconcile, the status), row by row as the lifecycle is described to users."""
    if not f.index:
        return False, IndexStatus.NONE
    if f.alone and f.level_before and f.ready_in_time and not f.crashes and not f.errors and f.flushed:
        return False, IndexStatus.WATCH_TERMINATED
    if f.cancelled and not f.reconcile_on_cancel:
        return False, IndexStatus.STALE
    if not f.fallback:
        return False, IndexStatus.FAILED
    if f.locked_out:
        return False, IndexStatus.FAILED
    return True, IndexStatus.READY_VIA_FALLBACK


@settings(deadline=None)
@given(facts)
def test_the_ending_is_the_first_that_matches(f: Facts) -> None:
    end = ending(f)
    assert (end.reconcile, end.status) == plain_ending(f)
    assert end is next(e for e in ENDS if e.applies(f))


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (Facts(index=False), "no index"),
        (Facts(level_before=True, ready_in_time=True, flushed=True, cancelled=True, fallback=False), "clean"),
        (Facts(cancelled=True, fallback=False), "cancelled"),
        (Facts(fallback=False), "fallback off"),
        (Facts(alone=False, locked_out=True), "locked out"),
        (Facts(alone=False, cancelled=True, locked_out=True), "cancelled"),
        (Facts(cancelled=True, reconcile_on_cancel=True), "otherwise"),
    ],
)
def test_every_ending_has_its_case(f: Facts, name: str) -> None:
    assert ending(f).name == name
    assert [end.name for end in ENDS] == ["no index", "clean", "cancelled", "fallback off", "locked out", "otherwise"]


@settings(deadline=None)
@given(facts, st.sampled_from(["alone", "level_before", "ready_in_time", "flushed"]))
def test_one_doubt_is_enough(f: Facts, doubt: str) -> None:
    assert not f.with_(**{doubt: False}).clean
    assert not f.with_(crashes=f.crashes + 1).clean
    assert not f.with_(errors=f.errors + 1).clean


def test_the_mark_stays_unless_the_index_was_proved_level() -> None:
    proved = {IndexStatus.WATCH_TERMINATED, IndexStatus.READY_VIA_FALLBACK}
    final = {IndexStatus.NONE, IndexStatus.STALE, IndexStatus.FAILED, *proved}
    for status in final - {IndexStatus.NONE}:
        assert (status in LEAVES_MARK) == (status not in proved)
    assert IndexStatus.NONE not in LEAVES_MARK  # no index, no mark
    assert {end.status for end in ENDS} | {IndexStatus.FAILED} == final


# --- the restarts ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 100) | st.integers(0, 40).map(float), max_size=30),
    st.integers(1, 8),
)
def test_restarts_by_a_plain_model(gaps: list[float], most: int) -> None:
    budget = RestartBudget(most=most)
    now = 1000.0
    restarts: list[float] = []
    for gap in gaps:  # a crash comes `gap` seconds after the restart before it
        now += gap
        recent = [at for at in restarts if now - at < 60.0]
        pause = budget.pause(now)
        if len(recent) >= most:
            assert pause is None
            continue
        assert pause == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0][len(recent)]
        now += pause
        budget = budget.spent(now)
        restarts.append(now)
    for first in restarts:
        assert len([at for at in restarts if 0 <= at - first < 60.0]) <= most
    assert len(budget.past) <= most


def test_the_budget_as_it_comes() -> None:
    budget = RestartBudget()
    pauses = []
    now = 0.0
    while (pause := budget.pause(now)) is not None:
        pauses.append(pause)
        now += pause
        budget = budget.spent(now)
    assert pauses == [0.5, 1.0, 2.0]
    assert budget.pause(0.5 + 59.9) is None
    assert budget.pause(0.5 + 60.0) == 2.0  # the first is forgotten
    assert budget.pause(now + 60.0) == 0.5
