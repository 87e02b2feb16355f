"""Control groups: where they are, who may make them, that they are removed, and limits."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from supervise import FailureKind, JobSpec, Outcome, Settings, Supervisor, UnsupportedPlatform, open_supervisor
from supervise.model import Limits
from supervise.processes import cgroup
from supervise.processes.cgroup import Group, NoCgroup, NoLimit, own_directory
from supervise.processes.tiers import open_containments
from tests.processes.lone import NOBODY, Programs, group_of, inside, lone, python_for_nobody
from tests.processes.test_child import LIMIT, as_root, within
from tests.processes.test_sweep import LOST, WAITS, keepers, settings_of, wait_until


def reason_against_groups() -> str | None:
    try:
        cgroup.make("test-reason").remove()
    except NoCgroup as error:
        return str(error)
    return None


REASON = reason_against_groups()
with_groups = pytest.mark.skipif(REASON is not None, reason=f"no cgroup here: {REASON}")

# --- where we are ------------------------------------------------------------------------------------------------

TMPFS = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755"
MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"


def proc(tmp_path: Path, groups: str, *mounts: str) -> Path:
    """What /proc/self would be."""
    directory = tmp_path / "proc"
    directory.mkdir()
    (directory / "cgroup").write_text(groups)
    (directory / "mountinfo").write_text("".join(f"{mount}\n" for mount in mounts))
    return directory


def mounted(root: str, place: Path | str) -> str:
    return f"41 31 0:38 {root} {place} rw,nosuid shared:12 master:3 - cgroup2 cgroup2 rw,nsdelegate"


@pytest.mark.parametrize(
    ("groups", "root", "place", "ours"),
    [
        pytest.param("0::/\n", "/", "cgroup", "cgroup", id="unified, the root"),
        pytest.param("0::/a/b.service\n", "/", "cgroup", "cgroup/a/b.service", id="unified"),
        pytest.param("12:memory:/other\n1:name=systemd:/x\n0::/a\n", "/", "unified", "unified/a", id="hybrid"),
        pytest.param("0::/docker/abc/in\n", "/docker/abc", "cgroup", "cgroup/in", id="a part is mounted"),
        pytest.param("0::/docker/abc\n", "/docker/abc", "cgroup", "cgroup", id="our own part is mounted"),
        pytest.param("0::/a:b c#d\n", r"/a:b\040c\043d", "x", "x", id="escaped root"),
        pytest.param("0::/a\n", "/", r"tab\011blank\040back\134040slash", "tab\tblank back\\040slash/a", id="escaped"),
        pytest.param("0::/a\x0bb\u2028c\n", "/", "cgroup", "cgroup/a\x0bb\u2028c", id="what is no end of a line"),
    ],
)
def test_our_own_group_is_found(tmp_path: Path, groups: str, root: str, place: str, ours: str) -> None:
    (tmp_path / ours).mkdir(parents=True)
    fake = proc(tmp_path, groups, TMPFS, MEMORY, mounted(root, f"{tmp_path}/{place}"))
    assert own_directory(fake) == tmp_path / ours


def test_the_mount_that_shows_our_group_is_taken(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    mounts = mounted("/another", tmp_path / "first"), mounted("/docker", tmp_path / "second")
    assert own_directory(proc(tmp_path, "0::/docker\n", *mounts)) == tmp_path / "second"


@pytest.mark.parametrize(
    ("groups", "mounts"),
    [
        pytest.param("9:name=systemd:/\n4:memory:/x\n", [TMPFS, MEMORY], id="version 1 alone"),
        pytest.param("4:memory:/x\n", [TMPFS, mounted("/", "/")], id="we are in none"),
        pytest.param("0::/\n", [TMPFS, MEMORY], id="not mounted"),
        pytest.param("0::/a\n", [mounted("/docker/abc", "/")], id="another part is mounted"),
        pytest.param("0::/docker/abcd\n", [mounted("/docker/abc", "/")], id="a name that begins alike"),
        pytest.param("0::/\n", [mounted("/..", "/")], id="mounted from outside of our namespace"),
        pytest.param("0::/no/such/group (deleted)\n", [mounted("/", "/")], id="it was removed"),
    ],
)
def test_why_our_own_group_is_not_found(tmp_path: Path, groups: str, mounts: list[str]) -> None:
    with pytest.raises(NoCgroup, match="no cgroup v2 hierarchy is mounted"):
        own_directory(proc(tmp_path, groups, *mounts))


def test_a_group_outside_of_our_namespace_is_not_taken_for_ours(tmp_path: Path) -> None:
    for name in ("cgroup", "other"):
        (tmp_path / name).mkdir()
    with pytest.raises(NoCgroup, match="no cgroup v2 hierarchy is mounted"):
        own_directory(proc(tmp_path, "0::/../other\n", mounted("/", tmp_path / "cgroup")))


def test_a_proc_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NoCgroup, match="cannot be read: No such file"):
        own_directory(tmp_path)


# --- who may -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that looks like the group that we are in, but makes no files in its new directories."""
    base = tmp_path / "cgroup"
    base.mkdir()
    (base / "cgroup.procs").touch()
    monkeypatch.setattr(cgroup, "own_directory", lambda: base)
    return base


def test_a_kernel_without_cgroup_kill_gives_no_groups(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.mkdir

    def mkdir(self: Path, *args: int, **kwargs: bool) -> None:
        real(self, *args, **kwargs)
        if self.parent == fake:
            (self / "cgroup.procs").touch()

    def rmdir(self: Path) -> None:
        (self / "cgroup.procs").unlink()
        os.rmdir(self)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    with pytest.raises(NoCgroup, match=r"has no cgroup.kill .*Linux 5.14"):
        cgroup.make("x")
    assert os.listdir(fake) == ["cgroup.procs"]


def test_a_hierarchy_that_takes_no_more_groups(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: int, **kwargs: bool) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(NoCgroup, match=r"no group can be made in .*Resource temporarily unavailable"):
        cgroup.make("x")


@pytest.mark.parametrize("tier", ["auto", "cgroup"])
async def test_without_groups_only_who_insists_is_refused(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    (fake / "cgroup.procs").unlink()
    settings = Settings(state_dir=tmp_path / "state", containment=tier)
    why = f"{fake} is not ours to make groups in: no right to write cgroup.procs"
    if tier == "auto":
        async with open_containments(settings) as containments:
            assert (containments.tier, containments.notes) == ("guardian", (f"{why}; have it delegated to us",))
        return
    with pytest.raises(UnsupportedPlatform) as caught:
        async with open_containments(settings):
            pytest.fail("it was opened")
    assert str(caught.value).startswith(f"containment is 'cgroup', but {why}")
    assert str(caught.value).endswith("set it to auto or guardian")


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A state directory of another user."""
    path = Path(tempfile.mkdtemp(prefix="supervise-test-"))
    os.chown(path, NOBODY, NOBODY)
    yield path
    shutil.rmtree(path)


AS_NOBODY = {"user": NOBODY, "group": NOBODY, "extra_groups": []}


def python() -> list[str]:
    path = python_for_nobody()
    if path is None:
        pytest.skip("no Python here that another user may run")
    return [path]


@as_root
@with_groups
def test_another_user_in_our_group_gets_a_guardian_and_is_told_why(nobodys: Path) -> None:
    program = ["/usr/bin/id", "-u"]
    with lone(program, python=python(), settings=settings_of(nobodys, "auto"), popen=AS_NOBODY) as supervisor:
        assert supervisor.tier == "guardian"
        (note,) = supervisor.notes
        assert note == f"{own_directory()} is not ours to make groups in: no right to write cgroup.procs; " + (
            "have it delegated to us"
        )
        assert supervisor.result()["text"] == f"{NOBODY}\n"
        assert supervisor.popen.wait(LIMIT) == 0
    assert list((nobodys / "run").iterdir()) == []


#: Goes into the group, becomes the user and then the program.
ENTER = """
import os, sys
file, user, *program = sys.argv[1:]
with open(file, "w") as procs:
    procs.write("0")
os.setgroups([]), os.setresgid(*[int(user)] * 3), os.setresuid(*[int(user)] * 3)
os.execv(program[0], program)
"""


@contextmanager
def delegated() -> Iterator[Path]:
    """A group that another user may do with as it likes."""
    group = own_directory() / f"supervise-test-{os.getpid()}"
    group.mkdir()
    try:
        for path in (group, *(group / name for name in ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads"))):
            os.chown(path, NOBODY, NOBODY)
        yield group
    finally:
        Group(group).kill()
        wait_until(Group(group).remove)


@as_root
@with_groups
@pytest.mark.parametrize("end", ["well", "killed"])
def test_another_user_has_groups_where_they_are_delegated(nobodys: Path, end: str) -> None:
    with delegated() as group:
        command = [sys.executable, "-c", ENTER, str(group / "cgroup.procs"), str(NOBODY), *python()]
        lost, waits = ([*python(), *program[1:]] for program in (LOST, WAITS))
        last = ["/bin/cat", "/proc/self/cgroup"] if end == "well" else waits
        with lone(lost, last, python=command, settings=settings_of(nobodys, "cgroup")) as supervisor:
            assert (supervisor.tier, supervisor.notes) == ("guardian and cgroup", [])
            if end == "well":
                result = supervisor.result()
                assert result["outcome"] == "completed"
                assert f"{group.name}/supervise-" in result["text"]
                assert result["survivors"] == []
                assert supervisor.popen.wait(LIMIT) == 0
            else:
                supervisor.tell("ready")
                supervisor.kill()
            wait_until(lambda: [path for path in group.iterdir() if path.is_dir()] == [])
            wait_until(lambda: not Group(group).populated())


@as_root
@with_groups
@pytest.mark.parametrize("said", [True, False])
def test_a_supervisor_in_a_subgroup_makes_its_group_beside_it_where_that_is_delegated(
    tmp_path: Path, said: bool
) -> None:
    with delegated() as group:
        if said:
            os.setxattr(group, "user.delegate", b"1")
        (group / "subgroup").mkdir()
        command = [sys.executable, "-c", ENTER, str(group / "subgroup" / "cgroup.procs"), "0", sys.executable]
        with lone(
            ["/bin/cat", "/proc/self/cgroup"], python=command, settings=settings_of(tmp_path, "cgroup")
        ) as supervisor:
            assert supervisor.group.parent == (group if said else group / "subgroup")
            assert f"/{supervisor.group.name}/agent-" in supervisor.result()["text"]
            assert supervisor.popen.wait(LIMIT) == 0
        assert not supervisor.group.exists()


# --- groups are removed ------------------------------------------------------------------------------------------


def spec(*programs: list[str], **more: object) -> JobSpec:
    heard = more.pop("sink", None)
    return JobSpec(prompt="go", workspace="/", index=None, agent=Programs(programs, heard), **more)  # type: ignore[arg-type]  # any field


def top_of(supervisor: Supervisor) -> Path:
    """The supervisor's own group."""
    group = group_of(supervisor)
    assert group is not None
    return group


@with_groups
@within(LIMIT)
async def test_a_job_that_has_ended_has_no_group(tmp_path: Path) -> None:
    async with open_supervisor(settings=Settings(**settings_of(tmp_path, "cgroup"))) as supervisor:
        top = top_of(supervisor)
        assert (await supervisor.run(spec(LOST, ["/bin/true"]))).outcome is Outcome.COMPLETED
        await emptied(top)
    assert not top.exists()


@with_groups
@pytest.mark.parametrize("end", ["cancelled", "guardian killed"])
@within(LIMIT)
async def test_a_job_that_is_ended_leaves_no_group(tmp_path: Path, end: str) -> None:
    heard = bytearray()
    async with open_supervisor(settings=Settings(**settings_of(tmp_path, "cgroup"))) as supervisor:
        top = top_of(supervisor)
        job = await supervisor.start(spec(LOST, WAITS, sink=heard.extend))
        while heard.count(b"ready") < 2:
            await trio.sleep(0.005)
        assert len(inside(top)) == 1
        if end == "cancelled":
            job.cancel()
        else:
            _, guardians = keepers(tmp_path)
            os.kill(guardians[0], signal.SIGKILL)
        result = await job.result()
        assert result.survivors == ()
        await emptied(top)
    assert not top.exists()


@with_groups
@within(LIMIT)
async def test_fifty_trees_leave_no_group(tmp_path: Path) -> None:
    async with open_supervisor(settings=Settings(**settings_of(tmp_path, "cgroup"))) as supervisor:
        top = top_of(supervisor)
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(supervisor.run, spec(["/bin/true"]))
        await emptied(top)
    assert not top.exists()


async def emptied(top: Path) -> None:
    """Wait until only the supervisor's own group is left: guardians remove theirs after the end of their trees."""
    with trio.fail_after(5):
        while inside(top):
            await trio.sleep(0.005)
    assert top.is_dir()


def test_a_group_is_removed_with_what_it_holds_and_only_when_it_is_empty(tmp_path: Path) -> None:
    group = Group(tmp_path / "a").path
    (group / "b" / "c").mkdir(parents=True)
    (group / "b" / "busy").touch()
    assert not Group(group).remove()
    (group / "b" / "busy").unlink()
    assert Group(group).remove()
    assert not group.exists()
    assert Group(group).remove()


# --- limits ------------------------------------------------------------------------------------------------------

FILES = ("cgroup.controllers", "cgroup.subtree_control")


@pytest.fixture
def job_group(tmp_path: Path) -> Group:
    """Of a job, in a hierarchy whose controllers are all there: made of plain files."""
    group = tmp_path / "base" / "supervise-1" / "job-1"
    group.mkdir(parents=True)
    for directory in (group, group.parent, group.parent.parent):
        (directory / "cgroup.controllers").write_text("cpu memory pids\n")
        (directory / "cgroup.subtree_control").write_text("")
    for file in ("memory.max", "memory.swap.max", "pids.max"):
        (group / file).write_text("max\n")
    return Group(group)


def values(group: Group) -> dict[str, str]:
    return {path.name: path.read_text() for path in group.path.iterdir() if path.name not in FILES}


@pytest.mark.parametrize(
    ("limits", "written", "enabled"),
    [
        (Limits(memory_bytes=1 << 20), {"memory.max": "1048576", "memory.swap.max": "0"}, "+memory"),
        (Limits(processes=7), {"pids.max": "7"}, "+pids"),
        (
            Limits(processes=7, memory_bytes=1 << 21),
            {"memory.max": "2097152", "memory.swap.max": "0", "pids.max": "7"},
            "+pids",  # a plain file keeps what was written last
        ),
    ],
)
def test_limits_are_written(job_group: Group, limits: Limits, written: dict[str, str], enabled: str) -> None:
    job_group.limit(limits)
    assert values(job_group) == {**dict.fromkeys(("memory.max", "memory.swap.max", "pids.max"), "max\n"), **written}
    above = job_group.path.parent
    assert [(each / FILES[1]).read_text() for each in (above.parent, above, job_group.path)] == [enabled, enabled, ""]


def test_a_controller_that_is_enabled_is_not_enabled_again(job_group: Group) -> None:
    for each in (job_group.path.parent, job_group.path.parent.parent):
        (each / FILES[1]).write_text("cpu pids\n")
    job_group.limit(Limits(processes=7))
    assert (job_group.path.parent / FILES[1]).read_text() == "cpu pids\n"


def test_memory_is_limited_without_swap_accounting_too(job_group: Group) -> None:
    (job_group.path / "memory.swap.max").unlink()
    job_group.limit(Limits(memory_bytes=1 << 20))
    assert values(job_group) == {"memory.max": "1048576", "pids.max": "max\n"}


def test_a_controller_that_is_missing_is_named(job_group: Group) -> None:
    base = job_group.path.parent.parent
    (base / FILES[0]).write_text("cpu memory\n")
    with pytest.raises(NoLimit) as caught:
        job_group.limit(Limits(processes=7))
    assert str(caught.value) == f"the pids controller is not available here: {base}/cgroup.controllers lacks it"


@pytest.mark.parametrize(("number", "why"), [(errno.EBUSY, "there are processes in it"), (errno.EACCES, "Permission")])
def test_a_controller_that_cannot_be_enabled_is_told(
    job_group: Group, monkeypatch: pytest.MonkeyPatch, number: int, why: str
) -> None:
    def refuse(self: Path, text: str) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(NoLimit, match=rf"the memory controller is not available here: it cannot be enabled in .*{why}"):
        job_group.limit(Limits(memory_bytes=1 << 20))


def test_a_limit_that_cannot_be_written_is_told(job_group: Group) -> None:
    (job_group.path / "pids.max").unlink()
    (job_group.path / "pids.max").mkdir()
    with pytest.raises(NoLimit, match=r"pids.max cannot be set in .*job-1: Is a directory"):
        job_group.limit(Limits(processes=7))


@with_groups
@pytest.mark.parametrize(("controller", "limits"), [("memory", {"memory_bytes": 1 << 30}), ("pids", {"processes": 99})])
@within(LIMIT)
async def test_a_job_whose_limits_are_not_available_here_starts_nothing(
    tmp_path: Path, controller: str, limits: dict[str, int]
) -> None:
    if controller in (own_directory() / FILES[0]).read_text().split():
        pytest.skip(f"the {controller} controller is available here")
    witness = tmp_path / "witness"
    async with open_supervisor(settings=Settings(**settings_of(tmp_path / "state", "cgroup"))) as supervisor:
        result = await supervisor.run(spec(["/usr/bin/touch", str(witness)], limits=Limits(**limits)))
        assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.SPAWN)
        assert f"the {controller} controller is not available here" in str(result.error)
        assert not witness.exists()
        # Nothing of the attempt is left, and the next job is none the worse.
        assert inside(top_of(supervisor)) == []
        assert (await supervisor.run(spec(["/usr/bin/touch", str(witness)]))).outcome is Outcome.COMPLETED
    assert witness.exists()


@with_groups
@within(LIMIT)
async def test_a_limited_job_has_one_group_for_all_its_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here without the controllers: what `limit` writes is tested above."""
    limited: list[tuple[Path, Limits]] = []
    monkeypatch.setattr(Group, "limit", lambda self, limits: limited.append((self.path, limits)))
    limits = Limits(processes=99)
    async with open_supervisor(settings=Settings(**settings_of(tmp_path, "cgroup"))) as supervisor:
        top = top_of(supervisor)
        show = spec(["/bin/cat", "/proc/self/cgroup"], limits=limits)
        result = await supervisor.run(show)
        assert f"/{top.name}/job-{show.job_id}/agent-" in result.text
        assert limited == [(top / f"job-{show.job_id}", limits)]
        await supervisor.run(spec(["/bin/true"]))  # by the end of the next one the guardian of the first has ended
        await emptied(top)
    assert not top.exists()


@pytest.mark.parametrize("tier", ["guardian", "process-group"])
@within(LIMIT)
async def test_without_groups_there_are_no_limits(tmp_path: Path, tier: str) -> None:
    async with open_supervisor(settings=Settings(**settings_of(tmp_path, tier))) as supervisor:
        result = await supervisor.run(spec(["/bin/true"], limits=Limits(processes=99)))
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.SPAWN)
    assert "limits are not available here: the setting containment asks for" in str(result.error)
