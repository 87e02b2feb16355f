"""Scripts as agents of real jobs, and as what a worker's tasks name."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from supervise import (
    AgentSettings,
    FailureKind,
    IndexSettings,
    JobResult,
    JobSpec,
    Outcome,
    ScriptAgent,
    Settings,
    SpecError,
)
from supervise.catalogue import catalogue as module
from supervise.catalogue.catalogue import Catalogue
from supervise.codec import from_json, to_json
from supervise.dispatch.directory import in_thread
from supervise.dispatch.scripts import Wanted, WithScripts
from supervise.dispatch.task import Task
from supervise.dispatch.worker import open_worker
from supervise.errors import BadInput, SettingsError, SuperviseError
from supervise.events import AgentOutput, Event
from supervise.executors.mock import MockExecutor
from supervise.job.supervisor import Supervisor, open_supervisor
from tests.processes.conftest import TOKEN, Leaks
from tests.processes.workers import WORKER, Files, eventually, made_up, playing, settings_of

LIMIT = 30.0


def put(path: Path, text: str, *, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


class Runs:
    """Runs scripts below one supervisor; what they say is kept."""

    def __init__(self, supervisor: Supervisor, root: Path, leaks: Leaks) -> None:
        self.root = root
        self.events: list[Event] = []
        self._supervisor = supervisor
        self._env = {TOKEN: leaks.token}

    async def __call__(
        self, path: Path | str, *args: str, prompt: str = "a prompt", cancel_at: str = "", **fields: Any
    ) -> JobResult:
        """Cancelled when it prints a line `cancel_at`."""
        agent_fields = {name: fields.pop(name) for name in ("stdin", "name") if name in fields}
        agent = ScriptAgent(path=path, args=args, **agent_fields)
        spec = JobSpec(prompt=prompt, workspace=self.root, agent=agent, index=None, env=self._env, **fields)
        self.events = []
        with trio.fail_after(LIMIT):
            async with self._supervisor.open_job(spec) as job, job.subscribe() as events:
                async for event in events:
                    self.events.append(event)
                    if cancel_at and isinstance(event, AgentOutput) and event.line == cancel_at:
                        job.cancel("enough")
                return await job.result()

    def lines(self, stream: str) -> list[str]:
        return [event.line for event in self.events if isinstance(event, AgentOutput) and event.stream == stream]


@pytest.fixture
async def runs(tmp_path: Path, leaks: Leaks) -> Any:
    settings = Settings(
        state_dir=tmp_path / "state", tail_bytes=1000, orphan_grace=0.2, agent=AgentSettings(termination_timeout=1.0)
    )
    async with open_supervisor(settings=settings) as supervisor:
        yield Runs(supervisor, tmp_path, leaks)


# --- the agent ---------------------------------------------------------------------------------------------


async def test_a_script_has_its_arguments_the_prompt_and_the_workspace(runs: Runs, tmp_path: Path) -> None:
    script = put(tmp_path / "tools" / "say.sh", '#!/bin/sh\npwd; printf "<%s>" "$@"; echo; cat; echo oh >&2\n')
    result = await runs(script, "a b", "", "-x", "ü", prompt="first\nlast")
    assert result.outcome is Outcome.COMPLETED
    assert result.text == f"{tmp_path}\n<a b><><-x><ü>\nfirst\nlast"
    assert (result.exit_code, result.error, result.stderr_tail) == (0, None, "oh\n")
    assert runs.lines("stdout") == [str(tmp_path), "<a b><><-x><ü>", "first", "last"]
    assert runs.lines("stderr") == ["oh"]
    result = await runs(script, stdin="")
    assert result.text == f"{tmp_path}\n<>\n"


async def test_the_text_is_the_end_of_what_a_script_prints_and_the_log_is_all(runs: Runs, tmp_path: Path) -> None:
    script = put(tmp_path / "much.sh", "#!/bin/sh\nseq 1 2000; head -c 200000 /dev/zero | tr '\\0' x; echo; echo end\n")
    result = await runs(script)
    assert len(result.text) == 1000
    assert result.text.endswith("x\nend\n")
    log = tmp_path / "state" / "jobs" / result.job_id / "agent.stdout.log"
    assert len(log.read_bytes()) == len("".join(f"{n}\n" for n in range(1, 2001))) + 200_000 + len("\nend\n")
    assert max(map(len, runs.lines("stdout"))) <= 64 * 1024
    assert runs.lines("stdout")[-1] == "end"


async def test_another_exit_code_is_an_error_with_the_last_line_of_standard_error(runs: Runs, tmp_path: Path) -> None:
    script = put(
        tmp_path / "fail.sh", "#!/bin/sh\necho out\necho first >&2\necho 'disk is full' >&2\necho >&2\nexit 3\n"
    )
    result = await runs(script, name="backup")
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.AGENT_ERROR)
    assert result.error == "the script 'backup' ended with exit code 3: disk is full"
    assert (result.exit_code, result.text) == (3, "out\n")
    result = await runs(put(tmp_path / "mute.sh", "#!/bin/sh\nexit 1\n"))
    assert result.error == "the script 'mute' ended with exit code 1"
    result = await runs(put(tmp_path / "wordy.sh", "#!/bin/sh\nseq -s ' ' 1 999 >&2; exit 1\n"))
    assert result.error is not None
    assert len(result.error) < 400


async def test_a_signal_is_told(runs: Runs, tmp_path: Path) -> None:
    result = await runs(put(tmp_path / "die.sh", "#!/bin/sh\necho last words >&2\nkill -SEGV $$\n"))
    assert (result.failure_kind, result.signal) == (FailureKind.KILLED, "SIGSEGV")
    assert result.error == "the script 'die' ended with signal SIGSEGV"


async def test_input_that_nobody_reads_is_no_failure(runs: Runs, tmp_path: Path) -> None:
    script = put(tmp_path / "deaf.sh", "#!/bin/sh\nexec 0<&-\necho fine\n")
    result = await runs(script, prompt="x" * 1_000_000)
    assert (result.outcome, result.text) == (Outcome.COMPLETED, "fine\n")


@pytest.mark.parametrize(
    ("data", "mode", "told"),
    [
        ("#!/bin/sh\n", 0o644, "is not executable: chmod +x '{path}'"),
        ("echo no line\n", 0o755, "has no #! line; let its first line name its interpreter: #!/bin/sh"),
        ("#!/no/such/interpreter\n", 0o755, "the interpreter of the script"),
        ("#!/bin/sh\r\n", 0o755, "the interpreter of the script"),
        (None, 0, "is not there"),
    ],
)
async def test_what_cannot_be_started_says_what_to_do(
    runs: Runs, tmp_path: Path, data: str | None, mode: int, told: str
) -> None:
    path = tmp_path / "my script.py"
    if data is not None:
        put(path, data, mode=mode)
    result = await runs(path)
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.SPAWN)
    assert told.format(path=path) in (result.error or "")
    assert str(path) in (result.error or "")


async def test_a_path_that_would_steer_a_terminal_does_not_in_the_error(runs: Runs, tmp_path: Path) -> None:
    result = await runs(put(tmp_path / "a\x1b]0;x\x07.sh", mode=0o644, text="#!/bin/sh\n"))
    assert result.failure_kind is FailureKind.SPAWN
    assert "chmod +x" in (result.error or "")
    assert (result.error or "").isprintable()


async def test_arguments_that_are_too_large_are_told(runs: Runs, tmp_path: Path) -> None:
    result = await runs(put(tmp_path / "x.sh", "#!/bin/sh\n"), "x" * 1_000_000)
    assert result.failure_kind is FailureKind.SPAWN
    assert "too large" in (result.error or "")


async def test_the_line_decides_who_runs_it_and_not_the_suffix(runs: Runs, tmp_path: Path) -> None:
    result = await runs(put(tmp_path / "x.py", "#!/bin/sh\necho I am $0\n"))
    assert result.text == f"I am {tmp_path}/x.py\n"


async def test_a_name_of_odd_bytes_and_an_argument_of_them_are_no_trouble(runs: Runs, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/a\nb\x1b\xe4.sh"
    put(Path(os.fsdecode(path)), '#!/bin/sh\nprintf "%s" "$1" | od -An -tx1\n')
    result = await runs(os.fsdecode(path), os.fsdecode(b"\xe4"))
    assert (result.outcome, result.text) == (Outcome.COMPLETED, " e4\n")


async def test_signals_that_python_ignores_are_not_ignored_by_scripts(runs: Runs, tmp_path: Path) -> None:
    result = await runs(put(tmp_path / "pipe.sh", "#!/bin/sh\nsh -c 'kill -PIPE $$; echo alive'\necho $?\n"))
    assert result.text == "141\n"


async def test_a_script_that_takes_too_long_is_ended_with_all_that_it_has_started(runs: Runs, tmp_path: Path) -> None:
    script = put(tmp_path / "hang.sh", "#!/bin/sh\necho begun\n(trap '' HUP; setsid sleep 600) &\nsleep 600\n")
    result = await runs(script, timeout=0.3)
    assert (result.outcome, result.text) == (Outcome.TIMED_OUT, "begun\n")


@pytest.mark.parametrize("code", [0, 3])
async def test_how_a_script_answers_when_it_is_ended_is_no_verdict(runs: Runs, tmp_path: Path, code: int) -> None:
    script = put(
        tmp_path / "polite.sh",
        f"#!/bin/sh\ntrap 'echo bye; exit {code}' TERM\necho begun\nwhile :; do sleep 0.05; done\n",
    )
    result = await runs(script, timeout=0.3)
    assert (result.outcome, result.failure_kind) == (Outcome.TIMED_OUT, None)
    assert (result.text, result.exit_code) == ("begun\nbye\n", code)
    assert "did not end within 0.3 s" in (result.error or "")
    result = await runs(script, cancel_at="begun")
    assert (result.outcome, result.failure_kind, result.exit_code) == (Outcome.CANCELLED, None, code)


async def test_a_script_that_has_ended_well_has_completed_though_its_time_ends_while_others_are_ended(
    runs: Runs, tmp_path: Path
) -> None:
    text = "#!/bin/sh\n(trap '' TERM; sleep 600) >/dev/null 2>&1 &\nuntil [ -e /proc/$! ]; do :; done\nsleep 0.2\n"
    result = await runs(put(tmp_path / "leave.sh", text + "echo done\n"), timeout=0.6)
    assert (result.outcome, result.text) == (Outcome.COMPLETED, "done\n")
    assert result.duration_seconds > 0.6


async def test_what_a_script_leaves_behind_is_ended_and_it_has_completed(runs: Runs, tmp_path: Path) -> None:
    script = put(tmp_path / "leave.sh", "#!/bin/sh\nsetsid sleep 600 >/dev/null 2>&1 &\necho done\n")
    result = await runs(script)
    assert (result.outcome, result.text) == (Outcome.COMPLETED, "done\n")


def test_an_agent_that_makes_no_sense_is_refused() -> None:
    for fields in ({"path": ""}, {"path": "a\0"}, {"path": 5}, {"path": "a", "args": "b"}, {"path": "a", "args": [1]}):
        with pytest.raises(SpecError):
            ScriptAgent(**fields)  # type: ignore[arg-type]  # what is wrong is the point
    with pytest.raises(SpecError, match=r"ScriptAgent\.args"):
        ScriptAgent(path="a", args=["a\0"])


def test_a_spec_with_a_script_goes_through_json(tmp_path: Path) -> None:
    agent = ScriptAgent(path="bin/x.sh", args=["a", ""], stdin="in")
    assert (agent.path, agent.name) == (os.path.abspath("bin/x.sh"), "x")
    spec = JobSpec(prompt="p", workspace=tmp_path, agent=agent, index=None)
    assert from_json(JobSpec, to_json(spec)) == spec
    assert to_json(spec)["agent"]["kind"] == "script"


# --- the worker --------------------------------------------------------------------------------------------


def with_scripts(root: Path, **changes: Any) -> Settings:
    (root / "scripts").mkdir(exist_ok=True)
    return evolve(settings_of(root, **changes), script_dirs=(root / "scripts",))


async def test_a_task_with_a_script_runs_it_to_its_result(files: Files, root: Path, leaks: Leaks) -> None:
    """For real: worker, catalogue, job, process."""
    settings = evolve(with_scripts(root), executor="local", index=IndexSettings(mode="none"), orphan_grace=0.2)
    text = f"#!/bin/sh\n# name: greet\n# timeout: 1m\n{TOKEN}={leaks.token}; export {TOKEN}\n"
    put(root / "scripts" / "sub" / "g.sh", text + 'read who; echo "$1 $who"; [ "$2" != bad ] || exit 7\n')
    async with open_worker(WORKER, settings=settings):
        files.drop("t1", "world", script="greet", args=["hello", ""], colour="kept")
        files.drop("t2", "world", script="sub/g.sh", args=["so long,", "bad"], max_attempts=2)
        good = await files.ended("t1")
        bad = await files.buried("t2")
    assert (good["status"], good["text"]) == ("completed", "hello world\n")
    assert bad["dlq_reason"] == "max_retries_exceeded"
    assert "the script 'greet' ended with exit code 7" in bad["dlq_detail"]
    assert len(bad["attempts"]) == 2
    assert files.left() == []


def spec_with(executor: MockExecutor, task_id: str) -> JobSpec:
    (spec,) = [spec for spec in executor.executed if spec.labels["task_id"] == task_id]
    return spec


async def test_how_long_a_script_may_run_is_said_by_the_task_then_by_the_header_then_by_the_worker(
    files: Files, root: Path
) -> None:
    settings = with_scripts(root, task_timeout=77.0)
    for name, header in {"header": "timeout: 2m", "class": "task_class: LLM_HEAVY", "none": "tags: x"}.items():
        put(root / "scripts" / f"{name}.sh", f"#!/bin/sh\n# {header}\n")
    put(root / "scripts" / "bad.sh", "#!/bin/sh\n# timeout: soon\n")
    executor = playing()
    async with open_worker(WORKER, settings=settings, executor=executor):
        for name in ("header", "class", "none"):
            files.drop(name, script=name)
            files.drop(f"{name}-said", script=name, timeout=5)
        files.drop("bad-said", script="bad", timeout=5)
        files.drop("agent", args=5)
        for task_id in ("header", "class", "none", "header-said", "class-said", "none-said", "bad-said", "agent"):
            await files.ended(task_id)
    found = {spec.labels["task_id"]: spec.timeout for spec in executor.executed}
    assert found == {
        "header": 120.0,
        "class": 1200.0,
        "none": 77.0,
        "header-said": 5.0,
        "class-said": 5.0,
        "none-said": 5.0,
        "bad-said": 5.0,
        "agent": 77.0,
    }
    agent = spec_with(executor, "header").agent
    assert agent == ScriptAgent(path=root / "scripts" / "header.sh", name="header")
    assert spec_with(executor, "header").prompt == "ok"
    assert spec_with(executor, "agent").agent is None  # a task of its own meaning of `args`


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"script": "gret"}, "did you mean 'greet'?"),
        ({"script": "twice"}, "there are 2 scripts 'twice'"),
        ({"script": "mode"}, "chmod +x"),
        ({"script": "lineless"}, "no #! line"),
        ({"script": "soon"}, "line 2: timeout is 'soon'"),
        ({"script": "slow"}, "did you mean FAST_SCRIPT?"),
        ({"script": "../scripts/greet.sh"}, "there is no script"),
        ({"script": "greet", "args": "x"}, "args is 'x', but must be a list of texts"),
        ({"script": "greet", "args": [1]}, "args is [1]"),
        ({"script": "greet", "args": ["\0"]}, "args is"),
        ({"script": "greet", "workspace": "/"}, "worker.workspaces"),
    ],
)
async def test_a_script_that_cannot_be_run_is_a_dead_letter_that_says_why(
    files: Files, root: Path, fields: dict[str, Any], told: str
) -> None:
    settings = with_scripts(root)
    scripts = root / "scripts"
    for name in ("greet.sh", "twice.sh", "sub/twice.sh"):
        put(scripts / name, "#!/bin/sh\n")
    put(scripts / "mode.sh", "#!/bin/sh\n", mode=0o644)
    put(scripts / "lineless.sh", "echo\n")
    put(scripts / "soon.sh", "#!/bin/sh\n# timeout: soon\n")
    put(scripts / "slow.sh", "#!/bin/sh\n# task_class: FAST_SCRIT\n")
    executor = playing()
    async with open_worker(WORKER, settings=settings, executor=executor) as worker:
        files.drop("t", **fields)
        letter = await files.buried("t")
        assert letter["dlq_reason"] == "invalid_format"
        assert told in letter["dlq_detail"]
        for attempt in letter["attempts"]:
            assert "1970" not in attempt["started"]
            assert attempt["started"] <= attempt["ended"]
        assert len(letter["attempts"]) == (0 if "args" in fields else 1)
        files.drop("next", script="greet")  # and nobody else is kept from anything
        await files.ended("next")
        assert worker.status == "healthy" or worker.reasons == ()
    assert len(executor.executed) == 1
    assert files.left() == []


async def test_a_script_that_was_put_there_just_now_is_found(files: Files, root: Path) -> None:
    async with open_worker(WORKER, settings=with_scripts(root), executor=playing()):
        files.drop("t0", script="new")
        await files.buried("t0")
        put(root / "scripts" / "new.sh", "#!/bin/sh\n")
        files.drop("t1", script="new")
        assert (await files.ended("t1"))["status"] == "completed"


async def test_who_makes_the_specs_sees_the_script_and_its_limit_and_may_refuse_it(files: Files, root: Path) -> None:
    seen: list[JobSpec] = []

    def change(task: Task, spec: JobSpec) -> JobSpec:
        seen.append(spec)
        if task.task_id == "t2":
            raise SettingsError("not on a Sunday")
        if task.task_id == "t3":
            raise ZeroDivisionError("a bug")
        return evolve(spec, timeout=1.0)

    put(root / "scripts" / "x.sh", "#!/bin/sh\n# task_class: FAST_SCRIPT\n")
    executor = playing()
    async with open_worker(WORKER, settings=with_scripts(root), executor=executor, spec_of=change) as worker:
        files.drop("t1", script="x")
        await files.ended("t1")
        files.drop("t2", script="x")
        assert "not on a Sunday" in (await files.buried("t2"))["dlq_detail"]
        files.drop("t3", script="x")
        letter = await files.buried("t3")
        assert (letter["dlq_reason"], letter["dlq_detail"]) == (
            "invalid_format",
            "no job could be made of it: ZeroDivisionError: a bug",
        )
        assert "executor" not in " ".join(worker.reasons)
    assert [(spec.timeout, type(spec.agent)) for spec in seen] == [(120.0, ScriptAgent)] * 3
    assert executor.executed[0].timeout == 1.0


@pytest.mark.parametrize("trouble", ["away", "empty", "descriptors"])
async def test_a_script_that_cannot_be_looked_for_just_now_waits_for_that(
    files: Files, root: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    script = put(root / "scripts" / "x.sh", "#!/bin/sh\n")
    real = os.open
    refused = trouble == "descriptors"

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if refused and path == str(script):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(module.os, "open", refuse)
    async with open_worker(WORKER, settings=with_scripts(root), executor=playing()) as worker:
        if trouble == "empty":  # as if it were not mounted any more
            files.drop("first", script="x")
            await files.ended("first")
        if trouble != "descriptors":
            (root / "scripts").rename(root / "new")
        if trouble == "empty":
            (root / "scripts").mkdir()
        files.drop("t", script="x")
        await eventually(lambda: "is not known" in " ".join(worker.reasons), "the trouble in the worker's reasons")
        assert files.letter("t") is None
        refused = False
        if trouble != "descriptors":
            (root / "new").rename(root / "scripts")
        assert (await files.ended("t"))["status"] == "completed"
        await eventually(lambda: worker.status == "healthy", "the end of the trouble")
    assert files.letters() == []
    assert files.left() == []


class Slow:
    """A catalogue whose reading takes until it may end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_end, self.begun, self.times = threading.Event(), threading.Event(), 0
        real = Catalogue.read.__func__  # type: ignore[attr-defined]  # of a classmethod

        def read(cls: type[Catalogue], directories: Any) -> Catalogue:
            self.times += 1
            self.begun.set()
            if not self.may_end.wait(LIMIT / 3):
                self.may_end.set()  # the test has failed: the others need not wait
                raise AssertionError("it was waited for")
            found: Catalogue = real(cls, directories)
            return found

        monkeypatch.setattr(Catalogue, "read", classmethod(read))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    made = Slow(monkeypatch)
    try:
        yield made
    finally:
        made.may_end.set()


def looking_for(name: str, root: Path) -> JobSpec:
    task = Task(task_id="t", description="ok", script=name)
    return JobSpec(prompt="ok", workspace=root, agent=Wanted(task=task, change=None), index=None)


async def test_a_catalogue_that_takes_long_to_read_holds_up_nobody_else(files: Files, root: Path, slow: Slow) -> None:
    put(root / "scripts" / "x.sh", "#!/bin/sh\n")
    async with open_worker(WORKER, settings=with_scripts(root), executor=MockExecutor(made_up)) as worker:
        try:
            files.drop("script", script="x")
            assert await trio.to_thread.run_sync(slow.begun.wait, LIMIT)
            files.drop("other")
            assert (await files.ended("other"))["status"] == "completed"
            assert files.result("script") is None
            # A result is there a little before its task is no longer active.
            await eventually(lambda: worker.active_tasks == ("script",), "the script alone at work")
        finally:
            slow.may_end.set()
        assert (await files.ended("script"))["status"] == "completed"


async def test_lookups_that_wait_take_no_thread_from_the_worker_and_are_cancelled_at_once(
    root: Path, slow: Slow
) -> None:
    executor = WithScripts(playing(), [root])
    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(executor.execute, looking_for("x", root), lambda event: None)
        assert await trio.to_thread.run_sync(slow.begun.wait, LIMIT)
        with trio.fail_after(LIMIT / 6):
            assert await in_thread(int) == 0
        began = time.monotonic()
        nursery.cancel_scope.cancel()
    assert time.monotonic() - began < LIMIT / 6
    assert slow.times == 1


async def test_those_who_wait_for_a_slow_catalogue_share_it(root: Path, slow: Slow) -> None:
    put(root / "x.sh", "#!/bin/sh\n")
    known = MockExecutor()
    executor = WithScripts(known, [root])
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(executor.execute, looking_for("x", root), lambda event: None)
            assert await trio.to_thread.run_sync(slow.begun.wait, LIMIT)
            slow.may_end.set()
    assert len(known.executed) == 8
    assert slow.times <= 2  # on a slow machine, what was read may be too old for the last of them


async def test_a_catalogue_that_does_not_answer_is_no_fault_of_the_task(root: Path, slow: Slow) -> None:
    executor = WithScripts(playing(), [root], patience=0.05)
    for _ in range(3):  # whoever comes next waits no longer, and takes no thread more
        with trio.fail_after(LIMIT), pytest.raises(SuperviseError, match=r"was not found within 0\.05 s") as told:
            await executor.execute(looking_for("x", root), lambda event: None)
        assert not isinstance(told.value, BadInput)
        assert str(root) in str(told.value)
    assert slow.times == 1
