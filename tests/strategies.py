"""Hypothesis strategies for the values of the ground."""

from __future__ import annotations

import json
from pathlib import Path
from signal import Signals
from typing import Any

import attrs
from hypothesis import strategies as st

from supervise.events import (
    EVENT_TYPES,
    AgentEvent,
    AgentResult,
    AgentToolUse,
    Event,
    Heartbeat,
    JobFinished,
    ProcessBeat,
    UnknownEvent,
)
from supervise.model import (
    ExitStatus,
    FailureKind,
    IndexReport,
    IndexStatus,
    JobResult,
    JobSpec,
    Leftover,
    Limits,
    Outcome,
    StopPolicy,
    Survivor,
    SweepReport,
    Usage,
    WatchMetrics,
)
from supervise.settings import IndexSettings

# Lone surrogates included: os.fsdecode makes them of names that are no UTF-8.
texts = st.text(max_size=40)
#: Texts that a process can be given.
clean_texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
names = st.text(st.characters(exclude_characters="\0=", exclude_categories=["Cs"]), min_size=1, max_size=12)
counts = st.integers(0, 2**53)
finite = st.floats(allow_nan=False, allow_infinity=False)
lengths = st.floats(0, 1e9)
bounds = st.floats(0, 1e9, exclude_min=True)
#: Times of day as events carry them: to the microsecond, 1970 to 2096.
times = st.integers(0, 4_000_000_000_000_000).map(lambda micros: micros / 1_000_000)
job_ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True)
environments = st.dictionaries(names, clean_texts, max_size=4)

#: JSON as an agent may print it.
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | finite | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(texts, json_values, max_size=4)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def of(cls: Any, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Values of an attrs class: each field by its type, but for those in `fields`."""
    attrs.resolve_types(cls)
    return st.builds(
        cls,
        **{
            field.name: fields[field.name] if field.name in fields else _BY_TYPE[field.type]
            for field in attrs.fields(cls)
        },
    )


_BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    str: texts,
    str | None: optional(texts),
    int: counts,
    int | None: optional(counts),
    float: finite,
    float | None: optional(finite),
    bool: st.booleans(),
    tuple[str, ...]: st.lists(texts, max_size=3).map(tuple),
    dict[str, str]: st.dictionaries(texts, texts, max_size=3),
    Outcome: st.sampled_from(Outcome),
    FailureKind | None: optional(st.sampled_from(FailureKind)),
    IndexStatus: st.sampled_from(IndexStatus),
}

exit_statuses = st.builds(ExitStatus, code=st.integers(0, 255)) | st.sampled_from(Signals).map(
    lambda number: ExitStatus.of_signal(number)
)
usages = of(Usage)
_BY_TYPE[Usage] = usages
survivors = of(Survivor)
leftovers = of(Leftover)
sweep_reports = of(
    SweepReport,
    found=st.lists(leftovers, max_size=2).map(tuple),
    survivors=st.lists(survivors, max_size=2).map(tuple),
)
limits = st.builds(
    Limits, memory_bytes=optional(st.integers(1 << 20, 1 << 50)), processes=optional(st.integers(1, 1 << 22))
)
watch_metrics = of(WatchMetrics)
index_reports = of(IndexReport, metrics=watch_metrics)
job_results = of(
    JobResult,
    job_id=job_ids,
    usage=usages,
    index=index_reports,
    survivors=st.lists(survivors, max_size=2).map(tuple),
)
stop_policies = st.builds(
    StopPolicy,
    steps=st.lists(st.tuples(st.sampled_from(Signals), lengths), max_size=4).map(tuple),
    kill_wait=bounds,
)
index_settings = st.builds(
    IndexSettings,
    mode=st.sampled_from(["auto", "cidx", "none"]),
    command=st.lists(names, min_size=1, max_size=3).map(tuple),
    watch_enabled=st.booleans(),
    startup_timeout=lengths,
    reconcile_timeout=bounds,
)


def job_specs(workspace: Path, agents: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[JobSpec]:
    """Specs that work in `workspace`."""
    return st.builds(
        JobSpec,
        prompt=clean_texts.filter(str.strip),
        workspace=st.just(workspace),
        job_id=job_ids,
        agent=st.none() if agents is None else agents,
        index=st.none() | st.just("settings") | index_settings,
        timeout=bounds,
        env=environments,
        user=optional(names),
        limits=limits,
        labels=st.dictionaries(texts, texts, max_size=3),
    )


_SPECIAL: dict[type[Event], dict[str, st.SearchStrategy[Any]]] = {
    JobFinished: {"result": job_results},
    Heartbeat: {"processes": st.lists(of(ProcessBeat), max_size=2).map(tuple)},
    AgentToolUse: {"input": json_values},
    AgentResult: {"usage": usages},
    UnknownEvent: {"raw": json_objects},
}


def events_of(cls: type[Event]) -> st.SearchStrategy[Any]:
    """Events of one class, as they are before and after publication."""
    fields = {"time": optional(times), **_SPECIAL.get(cls, {})}
    if issubclass(cls, AgentEvent):
        fields.setdefault("raw", optional(json_objects))
    return of(cls, **fields)


#: Events of every class.
events: st.SearchStrategy[Event] = st.sampled_from(sorted(EVENT_TYPES)).flatmap(
    lambda name: events_of(EVENT_TYPES[name])
)

# --- tasks of a worker -----------------------------------------------------------------------------------------

#: What may be said of a task, so that it is one; few ids, so that they meet.
task_fields = st.fixed_dictionaries(
    {"task_id": st.sampled_from(["a", "a.b", "a-1", "B"]), "description": st.sampled_from(["d", "\u00fc\n"])},
    optional={
        "priority": st.integers(-3, 3) | st.sampled_from(["low", "normal", "high", "urgent"]),
        "dependencies": st.lists(st.sampled_from(["c", "d"]), max_size=2),
        "colour": st.sampled_from([None, 1.5, {"deep": [[]]}, "\ud800"]),
    },
)

#: What is no task: whole, and for good.
no_tasks = st.sampled_from(
    [
        {"description": "it has no id"},
        {"task_id": "a"},
        {"task_id": "../a", "description": "d"},
        {"task_id": "a", "description": "d", "priority": "soon"},
        {"task_id": "a", "description": "d", "max_attempts": 0},
        {"task_id": "a", "description": "d", "worker": "somebody else"},
        {"task_id": "a", "description": "d", "_supervise": {"attempts": 3}},
    ]
)


@attrs.frozen
class Dropped:
    """A file that somebody puts into tasks/."""

    name: str
    fields: dict[str, Any]
    is_valid: bool
    torn: bool = False

    def data(self, serial: int) -> bytes:
        """Its bytes, which are of no other file."""
        whole = json.dumps({**self.fields, "serial": serial}).encode()
        return whole[:-1] if self.torn else whole


file_names = st.sampled_from(["a.json", "B.json", "x.json", "a~2.json", "a~retry.json", "\u00e9 \n.json", "a.b.json"])
dropped_tasks = st.one_of(
    st.builds(Dropped, name=file_names, fields=task_fields, is_valid=st.just(True)),
    st.builds(Dropped, name=file_names, fields=task_fields, is_valid=st.just(True)),
    st.builds(Dropped, name=file_names, fields=no_tasks, is_valid=st.just(False)),
    st.builds(Dropped, name=file_names, fields=task_fields, is_valid=st.just(False), torn=st.just(True)),
)
