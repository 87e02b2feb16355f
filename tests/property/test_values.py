"""The values of the ground: they go through JSON unchanged, refuse what is bad, and cannot be changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from signal import Signals
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervise import events, model
from supervise.codec import event_from_json, event_to_json, from_json, loads, to_json, to_line
from supervise.errors import SettingsError, SpecError
from supervise.events import EVENT_TYPES, AgentEvent, Event, UnknownEvent, published, weight
from supervise.model import IndexReport, JobResult, JobSpec, Leftover, Limits, StopPolicy, SweepReport, Usage
from supervise.settings import AgentSettings, HttpSettings, IndexSettings, Settings, WorkerSettings
from tests import strategies

HERE = Path(__file__).parent


def through_json(value: Any) -> Any:
    return from_json(type(value), loads(to_line(to_json(value))))


# --- JSON --------------------------------------------------------------------------------------------------


@given(
    st.one_of(
        strategies.job_specs(HERE),
        strategies.job_results,
        strategies.index_reports,
        strategies.usages,
        strategies.stop_policies,
        strategies.exit_statuses,
        strategies.index_settings,
        strategies.limits,
        strategies.leftovers,
        strategies.sweep_reports,
    )
)
def test_every_value_comes_back_from_json(value: Any) -> None:
    back = through_json(value)
    assert back == value
    assert repr(back) == repr(value)  # "failed" equals Outcome.FAILED, and 1 equals 1.0


@pytest.mark.parametrize("name", sorted(EVENT_TYPES))
def test_each_event_comes_back_from_json(name: str) -> None:
    cls = EVENT_TYPES[name]
    assert getattr(events, cls.__name__) is cls  # not the class that attrs replaced by the one with slots

    @settings(max_examples=30)  # there are many types
    @given(strategies.events_of(cls))
    def comes_back(event: Event) -> None:
        line = to_line(event_to_json(event))
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        data = loads(line)
        assert data["type"] == name
        back = event_from_json(data)
        assert (back, back.time, back.job_id) == (event, event.time, event.job_id)
        assert repr(back) == repr(event)
        if isinstance(event, UnknownEvent):
            assert isinstance(back, UnknownEvent)
            assert back.raw == event.raw
        elif isinstance(event, AgentEvent):
            assert "raw" not in data

    comes_back()


@given(strategies.events, st.integers(1, 5000))
def test_published_events_are_stamped_and_small(event: Event, times: int) -> None:
    texts: dict[str, Any] = {f.name: "x" * times * 10 for f in attrs.fields(type(event)) if f.type in ("str", str)}
    shown = published(attrs.evolve(event, **texts), time=5.0, job_id="j")
    assert (shown.time, shown.job_id) == (5.0, "j")
    if isinstance(shown, AgentEvent):
        for name in texts:
            assert len(getattr(shown, name)) <= events.TEXT_LIMIT + 40
        assert weight(shown.raw or (), events.TEXT_LIMIT) <= events.TEXT_LIMIT


# --- rules -------------------------------------------------------------------------------------------------

not_bounds = st.sampled_from([0, -1, -0.5, math.nan, math.inf, True, "5", None, 10**400])
not_lengths: st.SearchStrategy[Any] = st.sampled_from([-1, -0.5, math.nan, -math.inf, False, "5", None, [], 10**5000])
not_counts = st.sampled_from([0, -1, 1.5, True, "3", None, math.inf])
not_memory: st.SearchStrategy[Any] = st.integers(max_value=(1 << 20) - 1) | st.sampled_from([True, 1e9, "1G", math.inf])
not_processes = st.integers(max_value=0) | st.sampled_from([True, False, 1.5, "3", math.nan])
not_commands: st.SearchStrategy[Any] = st.sampled_from([(), [], "", ("",), ("a", 5), ("a\0b",), 5, None, {"a": "b"}])
not_environments = st.sampled_from([5, "A=1", [("A", "1")], {"A=": "1"}, {"": "1"}, {"A": 1}, {"A": "\0"}])
not_texts = st.sampled_from(["", " \n", "a\0b", None, 5, b"x"])
not_switches = st.sampled_from(["yes", 1, 0, None])
not_secrets = st.sampled_from([5, b"key", ["key"], "k\0"])
not_paths = st.sampled_from([5, b"/tmp", "", "a\0b"])


def spec(**fields: Any) -> JobSpec:
    return JobSpec(**{"prompt": "do it", "workspace": HERE, **fields})


BAD: list[tuple[Callable[..., Any], str, st.SearchStrategy[Any], str, type[Exception]]] = [
    (spec, "prompt", not_texts, "JobSpec.prompt", SpecError),
    (spec, "workspace", not_paths | st.sampled_from(["/no/such", __file__, None]), "JobSpec.workspace", SpecError),
    (spec, "job_id", st.sampled_from(["", ".a", "a b", "a" * 129, "a/b", "a\n", 5]), "JobSpec.job_id", SpecError),
    (spec, "agent", st.sampled_from(["claude", 5, object()]), "JobSpec.agent", SpecError),
    (spec, "index", st.sampled_from(["cidx", 5, Settings()]), "JobSpec.index", SpecError),
    (spec, "timeout", not_bounds, "JobSpec.timeout", SpecError),
    (spec, "env", not_environments, "JobSpec.env", SpecError),
    (spec, "user", st.sampled_from(["", 0]), "JobSpec.user", SpecError),
    (spec, "labels", st.sampled_from([5, {"a": 1}, {1: "a"}, "a=b"]), "JobSpec.labels", SpecError),
    (spec, "limits", st.sampled_from([None, 5, {"processes": 5}, "none", StopPolicy()]), "JobSpec.limits", SpecError),
    (Limits, "memory_bytes", not_memory, "Limits.memory_bytes", SpecError),
    (Limits, "processes", not_processes, "Limits.processes", SpecError),
    (StopPolicy, "kill_wait", not_bounds, "StopPolicy.kill_wait", SpecError),
    (
        StopPolicy,
        "steps",
        st.sampled_from([5, None, [(15, -1)], ((15,),), [(999, 1)], [("TERM", 1)], [(15, math.inf)], [(15, "x")]]),
        "StopPolicy.steps",
        SpecError,
    ),
    (Settings, "kill_wait", not_bounds, "kill_wait", SettingsError),
    (Settings, "orphan_grace", not_lengths, "orphan_grace", SettingsError),
    (Settings, "guardian_timeout", not_bounds, "guardian_timeout", SettingsError),
    (Settings, "containment", st.sampled_from(["docker", "", None, 5, [], "Cgroup"]), "containment", SettingsError),
    (Settings, "executor", st.sampled_from(["docker", "", None, 5, []]), "executor", SettingsError),
    (Settings, "state_dir", not_paths | st.none(), "state_dir", SettingsError),
    (Settings, "agent", st.sampled_from([None, {}, IndexSettings()]), "agent", SettingsError),
    (AgentSettings, "command", not_commands, "agent.command", SettingsError),
    (AgentSettings, "env", not_environments, "agent.env", SettingsError),
    (AgentSettings, "pass_env", st.sampled_from(["A", 5, [""], ["A=B"], [5], None]), "agent.pass_env", SettingsError),
    (AgentSettings, "max_line", not_counts, "agent.max_line", SettingsError),
    (IndexSettings, "mode", st.sampled_from(["ci", "", None, True]), "index.mode", SettingsError),
    (IndexSettings, "watch_enabled", not_switches, "index.watch_enabled", SettingsError),
    (IndexSettings, "voyage_api_key", not_secrets, "index.voyage_api_key", SettingsError),
    (WorkerSettings, "root", not_paths, "worker.root", SettingsError),
    (WorkerSettings, "workspaces", st.sampled_from(["/a", 5, [5], [""], None]), "worker.workspaces", SettingsError),
    (WorkerSettings, "max_concurrent", not_counts, "worker.max_concurrent", SettingsError),
    (HttpSettings, "port", st.sampled_from([-1, 65536, "80", True, None]), "http.port", SettingsError),
    (HttpSettings, "host", st.sampled_from(["", None, 5]), "http.host", SettingsError),
]
HIDDEN = {"env", "voyage_api_key"}


@pytest.mark.parametrize(("make", "field", "bad", "named", "error"), BAD, ids=[f"{row[3]}" for row in BAD])
def test_bad_values_are_refused_by_name_value_and_rule(
    make: Callable[..., Any], field: str, bad: st.SearchStrategy[Any], named: str, error: type[Exception]
) -> None:
    @given(bad)
    def refused(value: Any) -> None:
        with pytest.raises(error) as caught:
            make(**{field: value})
        message = str(caught.value)
        assert message.startswith(named)
        assert "\n" not in message
        assert "must be" in message or "; " in message  # the rule, or what to do
        if field in HIDDEN:
            assert repr(value) not in message
        elif isinstance(value, str | float):
            assert repr(value)[:40] in message

    refused()


# --- frozen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        Settings(),
        AgentSettings(),
        IndexSettings(),
        spec(),
        StopPolicy(),
        Limits(),
        SweepReport(),
        Leftover(1, 0.0, "sleep"),
        Usage(),
        IndexReport(),
        JobResult(job_id="j", outcome=model.Outcome.COMPLETED),
        events.AgentText(text="a"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_cannot_be_changed(value: Any) -> None:
    for field in attrs.fields(type(value)):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(value, field.name, None)
    with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
        value.no_such_field = 1


def test_settings_and_specs_are_made_by_keyword_only() -> None:
    makers: list[Callable[..., Any]] = [Settings, AgentSettings, IndexSettings, JobSpec]
    for make in makers:
        with pytest.raises(TypeError):
            make("x")


@given(st.sampled_from(Signals))
def test_an_exit_status_names_its_signal(number: Signals) -> None:
    status = model.ExitStatus.of_signal(number)
    assert status.signal == number.name
    assert str(status) == f"signal {number.name}"
    assert not status.ok


def test_a_real_time_signal_has_a_name_too() -> None:
    assert model.ExitStatus.of_signal(40).signal == "SIG40"
