"""Programs that run as another user, on each tier; and which limits and users are refused, with what words."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from supervise import AgentSettings, FailureKind, JobSpec, Outcome, Settings, SpecError, run_job
from supervise.errors import SpawnError
from supervise.model import Limits
from supervise.processes.containment import Command
from supervise.processes.program import User, credentials
from tests.processes import children
from tests.processes.conftest import TOKEN
from tests.processes.lone import Programs, lone
from tests.processes.test_cgroup import AS_NOBODY, nobodys, python  # noqa: F401  # one is a fixture
from tests.processes.test_child import LIMIT, as_root, within
from tests.processes.test_sweep import TIERS, settings_of

SHOW = """
import json, os
ids = {"uids": os.getresuid(), "gids": os.getresgid(), "groups": os.getgroups()}
print(json.dumps({**ids, "environment": dict(os.environ)}))
"""


def settings(path: Path, tier: str) -> Settings:
    return Settings(**settings_of(path, tier), agent=AgentSettings(pass_env=(TOKEN,)))


def command(user: str | None) -> Command:
    return Command(argv=("tool",), cwd="/", env={}, user=user)


# --- another user ------------------------------------------------------------------------------------------------


@as_root
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["nobody", "somebody in a group"])
@within(LIMIT)
async def test_root_runs_a_job_as_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str, name: str
) -> None:
    interpreter = python()[0]
    groups = [65534]
    if name != "nobody":
        name, groups = "nobody", [4242, 4343, 65534]
        monkeypatch.setattr(os, "getgrouplist", lambda user, gid: [gid, *groups[:2]])
    for variable in ("XDG_RUNTIME_DIR", "TMPDIR", "CLAUDE_CONFIG_DIR"):
        monkeypatch.setenv(variable, "/ours")
    monkeypatch.setenv("HOME", "/root")
    spec = JobSpec(
        prompt="go", workspace="/", index=None, user=name, agent=Programs([[interpreter, "-I", "-S", "-c", SHOW]])
    )
    result = await run_job(spec, settings=settings(tmp_path, tier))
    assert (result.outcome, result.error) == (Outcome.COMPLETED, None)
    seen = json.loads(result.text)
    assert (seen["uids"], seen["gids"]) == ([65534] * 3, [65534] * 3)
    assert sorted(seen["groups"]) == groups
    entry = pwd.getpwnam(name)
    told = {key: seen["environment"].get(key) for key in ("HOME", "USER", "LOGNAME", "SHELL")}
    assert told == {"HOME": entry.pw_dir, "USER": name, "LOGNAME": name, "SHELL": entry.pw_shell}
    assert "/ours" not in seen["environment"].values()


@as_root
@pytest.mark.parametrize("tier", TIERS)
@within(LIMIT)
async def test_what_another_user_leaves_is_ended(tmp_path: Path, tier: str) -> None:
    interpreter = python()[0]
    daemons = [interpreter, "-I", "-S", children.__file__, "daemons", "2"]
    heard = bytearray()

    def hear(data: bytes) -> None:
        heard.extend(data)
        if heard.count(b"daemon") == 2:
            timeout.append(1)

    timeout: list[int] = []
    program = Programs([daemons, ["/bin/sleep", "0.3"]], hear)
    spec = JobSpec(prompt="go", workspace="/", index=None, user="nobody", agent=program)
    agent = AgentSettings(pass_env=(TOKEN,), termination_timeout=0.1)
    result = await run_job(spec, settings=Settings(**settings_of(tmp_path, tier), agent=agent))
    assert (result.outcome, result.survivors) == (Outcome.COMPLETED, ())
    assert timeout


@as_root
@pytest.mark.parametrize("tier", ["process-group", "auto"])
def test_who_is_not_root_cannot_run_a_job_as_another(nobodys: Path, tier: str) -> None:  # noqa: F811  # the fixture
    options = {"settings": settings_of(nobodys, tier), "job": {"user": "root"}, "popen": AS_NOBODY}
    with lone(["/bin/true"], python=python(), **options) as supervisor:
        result = supervisor.result()
    assert (result["outcome"], result["failure_kind"]) == ("failed", "spawn")
    why = "'/bin/true' was not started as 'root': only root may run programs as another user"
    assert result["error"] == why


@pytest.mark.parametrize("tier", TIERS)
@within(LIMIT)
async def test_a_user_who_does_not_exist_fails_the_job(tmp_path: Path, tier: str) -> None:
    spec = JobSpec(prompt="go", workspace="/", index=None, user="no-such-user", agent=Programs([["/bin/true"]]))
    result = await run_job(spec, settings=settings(tmp_path, tier))
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.SPAWN)
    assert result.error == "'/bin/true' was not started: there is no user 'no-such-user' here"


def test_a_user_who_does_not_exist_is_a_spawn_error() -> None:
    with pytest.raises(SpawnError, match="'tool' was not started: there is no user 'no-such-user' here") as caught:
        credentials(command("no-such-user"))
    assert caught.value.kind == "user"


def test_only_root_may_become_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(SpawnError, match="'tool' was not started as 'root': only root may") as caught:
        credentials(command("root"))
    assert caught.value.kind == "user"


def test_our_own_name_asks_for_nothing() -> None:
    assert credentials(command(None)) is None
    assert credentials(command(pwd.getpwuid(os.geteuid()).pw_name)) is None


def test_another_user_has_all_groups_that_the_system_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    entry = pwd.getpwall()[-1]
    if entry.pw_uid == 0:
        pytest.skip("root is the only user here")
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    assert credentials(command(entry.pw_name)) == User(entry.pw_uid, entry.pw_gid, tuple(groups))


# --- limits ------------------------------------------------------------------------------------------------------

MEMORY = "bytes, 1 MiB (1048576) or more, or None"
PROCESSES = "a whole number, 1 or more, or None"


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        *(("memory_bytes", value, MEMORY) for value in (0, -1, 1048575, True, 1e9, "1G", float("nan"), [])),
        *(("processes", value, PROCESSES) for value in (0, -1, True, False, 1.0, "8", float("inf"), {})),
    ],
)
def test_a_limit_that_cannot_be_one_is_refused_by_name_value_and_rule(field: str, value: Any, rule: str) -> None:
    with pytest.raises(SpecError) as caught:
        Limits(**{field: value})
    assert str(caught.value) == f"Limits.{field} is {value!r}, but must be {rule}"


@pytest.mark.parametrize("value", [None, 5, {"processes": 5}, "all"])
def test_the_limits_of_a_job_are_limits(value: Any) -> None:
    with pytest.raises(SpecError, match=r"JobSpec.limits is .*, but must be Limits\(memory_bytes=…, processes=…\)"):
        JobSpec(prompt="go", workspace="/", limits=value)


@within(LIMIT)
async def test_a_process_group_keeps_no_limits_and_says_so(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    program = Programs([["/usr/bin/touch", str(witness)]])
    spec = JobSpec(prompt="go", workspace="/", index=None, agent=program, limits=Limits(memory_bytes=1 << 30))
    result = await run_job(spec, settings=settings(tmp_path / "state", "process-group"))
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.SPAWN)
    why = "limits are not available here: the setting containment asks for process-group"
    assert result.error == f"'/usr/bin/touch' was not started: {why}"
    assert not witness.exists()
