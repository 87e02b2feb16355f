"""The catalogue on real directories, friendly and hostile ones."""

from __future__ import annotations

import difflib
import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from supervise.catalogue import catalogue as module
from supervise.catalogue.catalogue import Catalogue, Lookup, Match, Script
from supervise.catalogue.header import Header
from supervise.errors import BadInput, SuperviseError
from supervise.settings import Settings


def put(path: Path, text: str = "#!/bin/sh\n", *, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def named(directory: Path) -> dict[str, Script]:
    catalogue = Catalogue.read([directory])
    assert catalogue.troubles == ()
    return {script.name: script for script in catalogue.scripts}


def places(directory: Path) -> list[str]:
    return sorted(script.place for script in Catalogue.read([directory]).scripts)


# --- what is a script --------------------------------------------------------------------------------------


def test_scripts_are_known_by_their_suffix_or_their_first_line(tmp_path: Path) -> None:
    scripts = ["a.sh", "b.bash", "c.py", "d.rb", "e.pl", "f.js", "bare", "sub/g.sh", "sub/sub/h", "sp ace.sh", "x.y.sh"]
    for name in scripts:
        put(tmp_path / name)
    for name in [
        ".hidden.sh",
        ".git/hook",
        "sub/.x/y.sh",
        "node_modules/z/z.js",
        "__pycache__/m.py",
        "notes.md",
        "tool.v2",
        "a.sh~",
        "A.SH",
        "end.",
    ]:
        put(tmp_path / name)
    put(tmp_path / "README", "no shebang\n")
    put(tmp_path / "empty", "")
    put(tmp_path / "sub" / "late", "\n#!/bin/sh\n")
    assert places(tmp_path) == sorted(scripts)


def test_the_header_of_each_is_read_and_the_name_is_that_of_the_file_where_it_says_none(tmp_path: Path) -> None:
    put(tmp_path / "one.sh", "#!/bin/sh\n# name: Deploy It\n# tags: a, b\n# timeout: 5\n")
    put(tmp_path / "two.js", "#!/usr/bin/env node\n// description: Zwei\n")
    put(tmp_path / "three.sh", "#!/bin/sh\n# name: -bad\n")
    found = named(tmp_path)
    assert sorted(found) == ["Deploy It", "three", "two"]
    one = found["Deploy It"]
    assert (one.header.tags, one.header.limit, one.executable, one.obstacle) == (("a", "b"), 5.0, True, "")
    assert (one.path, one.place) == (str(tmp_path / "one.sh"), "one.sh")
    assert found["two"].header.description == "Zwei"
    assert "line 2: name" in found["three"].problems[0]


def test_scripts_are_in_the_order_of_their_names_then_of_their_paths(tmp_path: Path) -> None:
    for name in ["b.sh", "A.sh", "c/a.sh", "b/b.sh", "Z.sh"]:
        put(tmp_path / name)
    found = [(script.name, script.place) for script in Catalogue.read([tmp_path]).scripts]
    assert found == [("A", "A.sh"), ("a", "c/a.sh"), ("b", "b.sh"), ("b", "b/b.sh"), ("Z", "Z.sh")]


def test_a_script_that_is_not_executable_says_what_to_do(tmp_path: Path) -> None:
    script = put(tmp_path / "it's.sh", mode=0o644)
    found = named(tmp_path)["it's"]
    assert not found.executable
    assert found.problems == ()
    assert found.obstacle.startswith("it is not executable: chmod +x ")
    subprocess.run(found.obstacle.partition(": ")[2], shell=True, check=True)
    assert os.access(script, os.X_OK)
    assert named(tmp_path)["it's"].obstacle == ""


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("x.py", b"print(1)\n", "#!/usr/bin/env python3"),
        ("x.sh", b"", "#!/bin/sh"),
        ("x.js", b"// name: x\n", "#!/usr/bin/env node"),
        ("x.sh", b"\xef\xbb\xbf#!/bin/sh\n", "byte order mark"),
        ("x", b"\xef\xbb\xbf#!/bin/sh\n", "byte order mark"),
        ("x.sh", b"#!/bin/sh\r\necho\r\n", "carriage return"),
        ("x.sh", b"#!/bin/sh\necho\r\n", ""),
        ("x.sh", b"\x7fELF\x02\x01", ""),
        ("x", b"#!/bin/sh", ""),
    ],
)
def test_what_the_kernel_would_not_start_is_told(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / name).chmod(0o755)
    script = named(tmp_path)["x"]
    assert bool(script.obstacle) == bool(told)
    assert told in script.obstacle
    assert script.problems == ((script.obstacle,) if told else ())


# --- hostile directories -----------------------------------------------------------------------------------


def test_a_binary_and_a_huge_file_are_read_no_further_than_their_beginning(tmp_path: Path) -> None:
    (tmp_path / "binary.sh").write_bytes(bytes(range(256)) * 1000)
    (tmp_path / "latin.sh").write_bytes(b"#!/bin/sh\n# description: Gr\xf6\xdfe\n")
    with (tmp_path / "huge.sh").open("wb") as file:
        file.write(b"#!/bin/sh\n# description: huge\n")
        file.truncate(1 << 30)
    with (tmp_path / "hollow").open("wb") as file:
        file.truncate(1 << 30)
    put(tmp_path / "wordy.sh", "#!/bin/sh\n# description: begin\n" + "# word word word word word\n" * 5000)
    put(tmp_path / "long.sh", "#!/bin/sh\n# description: " + "x" * 200_000)
    found = named(tmp_path)
    assert sorted(found) == ["binary", "huge", "latin", "long", "wordy"]
    assert found["huge"].header.description == "huge"
    assert found["latin"].header.description == "Gr\ufffd\ufffde"
    assert found["wordy"].header.description.endswith("word word")  # no line is cut in its middle
    assert "too long" in found["wordy"].problems[0]
    assert all(len(script.header.description) < 16384 for script in found.values())


def test_pipes_sockets_devices_and_links_to_them_hold_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.sh")
    os.mkfifo(tmp_path / "bare")
    (tmp_path / "null.sh").symlink_to("/dev/null")
    (tmp_path / "tty.sh").symlink_to("/dev/tty")
    (tmp_path / "pipe.sh").symlink_to("x.sh")
    (tmp_path / "dangling.sh").symlink_to("nowhere")
    assert named(tmp_path) == {}


def test_a_file_that_becomes_a_pipe_between_the_looks_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "x.sh")

    def swapped(path: str, flags: int, real: Callable[[str, int], int] = os.open) -> int:
        os.unlink(path)
        os.mkfifo(path)
        return real(path, flags)

    monkeypatch.setattr(module.os, "open", swapped)
    assert named(tmp_path) == {}


def test_links_to_files_are_scripts_and_links_to_directories_are_not_followed(tmp_path: Path) -> None:
    directory, elsewhere = tmp_path / "scripts", tmp_path / "elsewhere"
    put(elsewhere / "real.sh")
    directory.mkdir()
    (directory / "file.sh").symlink_to(elsewhere / "real.sh")
    (directory / "dir").symlink_to(elsewhere)
    (directory / "self").symlink_to(directory)
    (directory / "loop.sh").symlink_to("loop.sh")
    catalogue = Catalogue.read([directory])
    assert [script.place for script in catalogue.scripts] == ["file.sh"]
    linked = tmp_path / "linked"
    linked.symlink_to(directory)
    assert places(linked) == ["file.sh"]  # but the directory that was named may be one


def test_a_directory_that_lies_below_another_is_read_once(tmp_path: Path) -> None:
    put(tmp_path / "sub" / "a.sh")
    (tmp_path / "again").symlink_to(tmp_path)
    catalogue = Catalogue.read([tmp_path / "sub", tmp_path, tmp_path / "again", tmp_path])
    assert [script.place for script in catalogue.scripts] == ["a.sh"]


def test_names_that_would_steer_a_terminal_are_kept_and_told_of_without_harm(tmp_path: Path) -> None:
    evil = "a\nb\x1b[2J\u202e"
    put(tmp_path / f"{evil}.sh", mode=0o644)
    put(tmp_path / "sub" / f"{evil}.sh")
    byte = os.fsdecode(b"\xe4.sh")
    put(tmp_path / byte)
    catalogue = Catalogue.read([tmp_path])
    assert [script.name for script in catalogue.scripts] == [evil, evil, "\udce4"]
    assert catalogue.scripts[0].obstacle.isprintable()
    assert catalogue.find("\udce4").path == str(tmp_path / byte)
    with pytest.raises(BadInput) as told:
        catalogue.find(evil)
    assert str(told.value).isprintable()
    with pytest.raises(BadInput) as told:
        catalogue.find(f"{evil}?")
    assert str(told.value).isprintable()


AS_NOBODY = """
import os, sys
from pathlib import Path
from supervise.catalogue.catalogue import Catalogue
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
found = Catalogue.read([Path(path) for path in sys.argv[1:]])
for script in found.scripts:
    print("script", script.name, script.executable, "|", script.obstacle, "|", *script.problems)
for trouble in found.troubles:
    print("trouble", trouble)
"""


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that others may enter: pytest's own are closed."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        yield Path(path)


def test_what_may_not_be_read_is_told_and_costs_nothing_else(public: Path) -> None:
    scripts, ours = public / "scripts", os.geteuid() != 0  # root reads all, and looks as somebody else
    put(scripts / "good.sh")
    put(scripts / "secret.sh", mode=0o300 if ours else 0o700)
    put(scripts / "bare", mode=0o300 if ours else 0o700)
    put(scripts / "mine.sh", mode=0o644 if ours else 0o744)
    closed = put(scripts / "closed" / "c.sh").parent
    closed.chmod(0 if ours else 0o700)
    argv = [sys.executable, "-c", AS_NOBODY, str(scripts), str(public / "gone")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2], check=False)
    closed.chmod(0o700)
    assert done.returncode == 0, done.stderr
    good, mine, secret, *troubles = done.stdout.splitlines()
    assert good.split() == ["script", "good", "True", "|", "|"]
    assert mine.startswith("script mine False | it ")
    assert secret.startswith(f"script secret {ours} | it cannot be read: Permission denied | it cannot be read")
    assert set(troubles) == {
        f"trouble the directory {closed} cannot be read: Permission denied",
        f"trouble the directory {public / 'gone'} cannot be read: No such file or directory",
        f"trouble {scripts / 'bare'} cannot be read: Permission denied",
    }


def test_the_number_of_scripts_and_of_files_is_bounded_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        put(tmp_path / f"{number}.sh")
    put(tmp_path / "sub" / "x.sh")
    monkeypatch.setattr(module, "MOST_SCRIPTS", 4)
    catalogue = Catalogue.read([tmp_path])
    assert len(catalogue.scripts) == 4
    assert catalogue.troubles == (f"there are more than 4 scripts; the rest of {tmp_path} is left out",)
    monkeypatch.setattr(module, "MOST_NAMES", 2)
    catalogue = Catalogue.read([tmp_path])
    assert len(catalogue.scripts) <= 2
    assert catalogue.troubles == (f"there are more than 2 files; the rest of {tmp_path} is left out",)


# --- directories that are not there ------------------------------------------------------------------------


def test_without_any_directory_the_catalogue_is_empty_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    catalogue = Catalogue.read(Settings().script_dirs)
    assert (catalogue.scripts, catalogue.troubles) == ((), ())
    assert str(tmp_path / "scripts") in catalogue.hint
    assert "script_dirs" in catalogue.hint
    with pytest.raises(BadInput, match="script_dirs"):
        catalogue.find("x")
    put(tmp_path / "scripts" / "x.sh")
    catalogue = Catalogue.read(Settings().script_dirs)
    assert catalogue.hint == ""
    assert catalogue.find("x").path == str(tmp_path / "scripts" / "x.sh")  # absolute: a job runs elsewhere


@pytest.mark.parametrize("kind", ["missing", "file", "dangling"])
def test_a_directory_that_was_named_and_cannot_be_read_is_told(tmp_path: Path, kind: str) -> None:
    put(tmp_path / "good" / "x.sh")
    bad = tmp_path / "bad"
    if kind == "file":
        bad.write_text("")
    if kind == "dangling":
        bad.symlink_to("nowhere")
    catalogue = Catalogue.read([bad, tmp_path / "good"])
    assert [script.name for script in catalogue.scripts] == ["x"]
    assert str(bad) in catalogue.troubles[0]
    assert found_out(catalogue.find, "y") == (SuperviseError, True)
    assert str(bad) in told_by(catalogue.find, "y")


# --- trouble that passes -----------------------------------------------------------------------------------


def told_by(find: Callable[[str], Script], name: str) -> str:
    with pytest.raises(SuperviseError) as told:
        find(name)
    return str(told.value)


def found_out(find: Callable[[str], Script], name: str) -> tuple[type[Exception], bool]:
    """What looking for a script that is not found raises, and whether it says that this is not known."""
    with pytest.raises(SuperviseError) as told:
        find(name)
    return type(told.value), "is not known" in str(told.value)


def refusing(monkeypatch: pytest.MonkeyPatch, function: str, wanted: Path, number: int) -> None:
    """A function of `os` that refuses one path, or all descriptors."""
    real = getattr(os, function)

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, int) or str(path) == str(wanted):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(module.os, function, refuse)


@pytest.mark.parametrize(
    ("function", "file", "number"),
    [
        ("open", "b.sh", errno.EMFILE),
        ("open", "b.sh", errno.ENFILE),
        ("open", "b", errno.ESTALE),
        ("read", "b.sh", errno.EIO),
        ("scandir", "", errno.EMFILE),
        ("stat", "", errno.ESTALE),
        ("scandir", "sub", errno.EACCES),
        ("open", "b.sh", errno.ENOENT),  # it went away between two looks: all may be going away
    ],
)
def test_a_script_that_is_not_seen_for_trouble_of_the_machine_is_not_called_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, file: str, number: int
) -> None:
    put(tmp_path / (file if file.startswith("b") else "b.sh"))
    put(tmp_path / "sub" / "c.sh")
    lookup = Lookup([tmp_path])
    with monkeypatch.context() as patch:
        refusing(patch, function, tmp_path / file, number)
        wanted = "c" if file == "sub" else "b"
        assert found_out(Catalogue.read([tmp_path]).find, wanted) == (SuperviseError, True)
        assert found_out(lookup.find, wanted) == (SuperviseError, True)
        if number != errno.ENOENT:
            assert os.strerror(number) in told_by(lookup.find, wanted)
    assert lookup.find("b").obstacle == ""
    assert found_out(lookup.find, "x") == (BadInput, False)


def test_a_script_that_nobody_may_read_is_so_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.sh")
    put(tmp_path / "b")
    for file in ("a.sh", "b"):
        refusing(monkeypatch, "open", tmp_path / file, errno.EACCES)
    catalogue = Catalogue.read([tmp_path])
    assert "Permission denied" in catalogue.find("a").obstacle
    assert found_out(catalogue.find, "b") == (BadInput, False)


@pytest.mark.parametrize("default", [False, True])
def test_a_directory_that_was_full_and_is_empty_or_gone_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default: bool
) -> None:
    """It is being replaced, or the file system that is mounted there is not."""
    monkeypatch.chdir(tmp_path)
    directories = Settings().script_dirs if default else (tmp_path / "empty", tmp_path / "scripts")
    (tmp_path / "empty").mkdir()
    lookup = Lookup(directories, max_age=0.0)
    (tmp_path / "scripts").mkdir()
    assert found_out(lookup.find, "a") == (BadInput, False)  # nothing was there so far
    put(tmp_path / "scripts" / "sub" / "a.sh")
    assert lookup.find("a").name == "a"
    (tmp_path / "scripts").rename(tmp_path / "away")
    assert found_out(lookup.find, "a") == (SuperviseError, True)
    (tmp_path / "scripts").mkdir()
    assert found_out(lookup.find, "a") == (SuperviseError, True)
    assert str(tmp_path / "scripts") in told_by(lookup.find, "a")
    (tmp_path / "scripts").rmdir()
    (tmp_path / "away").rename(tmp_path / "scripts")
    assert lookup.find("a").name == "a"
    assert found_out(lookup.find, "b") == (BadInput, False)


# --- finding -----------------------------------------------------------------------------------------------


def test_a_script_is_found_by_its_name_or_its_place(tmp_path: Path) -> None:
    put(tmp_path / "sub" / "a.sh", "#!/bin/sh\n# name: tool\n")
    put(tmp_path / "b.sh", "#!/bin/sh\n# name: sub/a.sh\n")
    catalogue = Catalogue.read([tmp_path])
    assert catalogue.find("tool").place == "sub/a.sh"
    assert catalogue.find("sub/a.sh").place == "b.sh"  # a name comes first
    assert catalogue.find("b.sh").place == "b.sh"
    assert catalogue.find(str(tmp_path / "sub" / "a.sh")).place == "sub/a.sh"
    for wrong in ("Tool", "a", "a.sh", "too", "", "../b.sh", "./b.sh"):
        with pytest.raises(BadInput, match="there is no script"):
            catalogue.find(wrong)


def test_the_nearest_name_is_told(tmp_path: Path) -> None:
    put(tmp_path / "backup-db.sh")
    with pytest.raises(BadInput, match="did you mean 'backup-db'"):
        Catalogue.read([tmp_path]).find("backup-bd")
    with pytest.raises(BadInput, match="supervise scripts list"):
        Catalogue.read([tmp_path]).find("x" * 100_000)


@pytest.mark.parametrize("wrong", ["xeploy-0123-north", "deploy-01x23-north", "deploy-0123-nort"])
def test_among_very_many_names_the_nearest_is_found_without_comparing_all(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    compared: list[int] = []
    real = difflib.get_close_matches

    def counting(word: str, possibilities: Any, *args: Any, **kwargs: Any) -> list[str]:
        compared.append(len(possibilities))
        return real(word, possibilities, *args, **kwargs)

    monkeypatch.setattr(module.difflib, "get_close_matches", counting)
    names = [f"deploy-{number:04}-north" for number in range(3000)]
    made = [Script(name=name, path=name, place=name, header=Header(), executable=True) for name in names]
    with pytest.raises(BadInput, match=r"did you mean 'deploy-0123-north'\?"):
        Catalogue(scripts=tuple(made)).find(wrong)
    assert compared
    assert max(compared) <= module.MOST_COMPARED


def test_two_scripts_of_one_name_are_refused_with_both_paths(tmp_path: Path) -> None:
    put(tmp_path / "a" / "x.sh")
    put(tmp_path / "b" / "x.py")
    catalogue = Catalogue.read([tmp_path / "a", tmp_path / "b"])
    assert len(catalogue.scripts) == 2
    with pytest.raises(BadInput) as told:
        catalogue.find("x")
    assert f"{tmp_path}/a/x.sh, {tmp_path}/b/x.py" in str(told.value)
    assert catalogue.find("x.py").path == f"{tmp_path}/b/x.py"
    assert catalogue.find(f"{tmp_path}/a/x.sh").place == "x.sh"


def test_how_long_a_script_may_run_is_refused_where_it_is_not_known(tmp_path: Path) -> None:
    put(tmp_path / "good.sh", "#!/bin/sh\n# task_class: FAST_SCRIPT\n")
    put(tmp_path / "none.sh")
    put(tmp_path / "bad.sh", "#!/bin/sh\n# timeout: soon\n# task_class: FAST_SCRIPT\n")
    put(tmp_path / "no.sh", mode=0o600)
    found = named(tmp_path)
    assert (found["good"].seconds(None, 9.0), found["good"].seconds(3.0, 9.0)) == (120.0, 3.0)
    assert found["none"].seconds(None, 9.0) == 9.0
    assert found["bad"].seconds(3.0, 9.0) == 3.0
    with pytest.raises(BadInput, match="line 2: timeout is 'soon'"):
        found["bad"].seconds(None, 9.0)
    with pytest.raises(BadInput, match="chmod"):
        found["no"].seconds(3.0, 9.0)


# --- searching ---------------------------------------------------------------------------------------------


def found_in(match: Match) -> list[str]:
    """The texts at the places."""
    header = match.script.header
    pairs = [(match.script.name, match.name), (header.description, match.description)]
    pairs += list(zip(header.tags, match.tags, strict=True))
    return [text[begin:end] for text, spans in pairs for begin, end in spans]


@pytest.mark.parametrize(
    ("query", "names", "texts"),
    [
        ("BACKUP", ["Backup", "sweep"], ["Backup", "backup"]),
        ("data  base", ["Backup"], ["data base"]),
        ("strasse", ["sweep"], ["Straße"]),
        ("STRASSE", ["sweep"], ["Straße"]),
        ("ß", ["Backup", "sweep"], ["ss", "ß"]),
        ("s", ["Backup", "sweep"], ["s", "s", "s", "s", "S", "ß"]),
        ("i̇", ["sweep"], ["İ"]),
        ("", ["Backup", "sweep", "zero"], []),
        ("  ", ["Backup", "sweep", "zero"], []),
        ("nothing", [], []),
        ("[a-z]", [], []),
        ("zero", ["zero"], ["zero"]),
        ("ever, this", [], []),  # two tags are two texts
        ("inputs only", [], []),
    ],
)
def test_search_looks_in_name_description_and_tags_whatever_the_case(
    tmp_path: Path, query: str, names: list[str], texts: list[str]
) -> None:
    put(tmp_path / "1.sh", "#!/bin/sh\n# name: Backup\n# description: Fess the data base\n# tags: ever, this\n")
    put(
        tmp_path / "2.sh", "#!/bin/sh\n# name: sweep\n# description: Straße, İ\n# tags: backup\n# inputs: inputs only\n"
    )
    put(tmp_path / "3.sh", "#!/bin/sh\n# name: zero\n")
    matches = Catalogue.read([tmp_path]).search(query)
    assert [match.script.name for match in matches] == names
    if query != "s":
        assert [text for match in matches for text in found_in(match)] == texts
    else:  # one letter that becomes two is one place for each
        assert {text for match in matches for text in found_in(match)} == {"s", "S", "ß"}


# --- again and again ---------------------------------------------------------------------------------------


class Counted:
    """How often the whole catalogue was read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        real = module._Reading.walk

        def walk(reading: module._Reading, root: str) -> None:
            self.times += 1
            real(reading, root)

        monkeypatch.setattr(module._Reading, "walk", walk)


def test_a_lookup_reads_the_catalogue_once_and_sees_what_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Counted(monkeypatch)
    put(tmp_path / "a.sh")
    put(tmp_path / "b.sh", mode=0o600)
    lookup = Lookup([tmp_path], max_age=1000.0)
    for _ in range(5):
        assert lookup.find("a").executable
        assert not lookup.find("b").executable
    assert reads.times == 1
    put(tmp_path / "b.sh", "#!/bin/sh\n# timeout: 5\n")
    assert (lookup.find("b").executable, lookup.find("b").header.limit) == (True, 5.0)
    assert reads.times == 1
    put(tmp_path / "sub" / "new.sh")
    assert lookup.find("new").place == "sub/new.sh"
    assert reads.times == 2
    put(tmp_path / "a.sh", "#!/bin/sh\n# name: other\n")
    with pytest.raises(BadInput, match="there is no script 'a'"):
        lookup.find("a")
    assert lookup.find("other").place == "a.sh"
    (tmp_path / "b.sh").unlink()
    with pytest.raises(BadInput):
        lookup.find("b")
    os.mkfifo(tmp_path / "b.sh")
    with pytest.raises(BadInput):
        lookup.find("b")


def test_a_lookup_refuses_a_name_that_two_scripts_have_each_time(tmp_path: Path) -> None:
    for name in ("a.sh", "x.sh", "x.py"):
        put(tmp_path / name)
    lookup = Lookup([tmp_path], max_age=1000.0)
    assert lookup.find("a").place == "a.sh"
    for _ in range(2):
        with pytest.raises(BadInput, match="2 scripts"):
            lookup.find("x")


def test_a_lookup_believes_itself_no_longer_than_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Counted(monkeypatch)
    put(tmp_path / "a.sh")
    lookup = Lookup([tmp_path], max_age=0.0)
    lookup.find("a")
    put(tmp_path / "sub" / "a.sh")
    with pytest.raises(BadInput, match="2 scripts"):
        lookup.find("a")
    assert reads.times == 2


def test_what_was_read_since_somebody_asked_is_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Counted(monkeypatch)
    put(tmp_path / "a.sh")
    lookup = Lookup([tmp_path], max_age=0.0)
    asked = module.time.monotonic()
    for _ in range(3):
        assert lookup.find("a", asked).name == "a"
        assert found_out(lambda name: lookup.find(name, asked), "b") == (BadInput, False)
    assert reads.times == 1
    assert lookup.find("a").name == "a"
    assert reads.times == 2


def test_what_takes_long_to_be_read_is_believed_as_long_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be too old for all who waited for it in vain, and it would be read for ever."""
    clock = [100.0]
    times = 0
    real = module._Reading.walk

    def walk(reading: module._Reading, root: str) -> None:
        nonlocal times
        times += 1
        clock[0] += 40.0
        real(reading, root)

    monkeypatch.setattr(module._Reading, "walk", walk)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    put(tmp_path / "a.sh")
    lookup = Lookup([tmp_path])
    lookup.find("a")
    clock[0] += 39.0
    lookup.find("a")
    assert times == 1
    clock[0] += 2.0
    lookup.find("a")
    assert times == 2


def test_the_default_of_the_setting_is_the_directory_that_may_be_missing() -> None:
    assert attrs.fields(Settings).script_dirs.default == (Path("scripts"),)
