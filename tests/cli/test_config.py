"""`supervise config`: each setting and where it comes from, without a secret."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from supervise.cli import config
from supervise.errors import SettingsError
from supervise.settings import Settings

KEY = "pa-TopSecret-0123456789"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and an environment that says nothing else."""
    for name in [*os.environ]:
        if name.startswith(("SUPERVISE_", "XDG_")) or name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


class Shown:
    """Runs the command in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd
        self.err = ""

    async def __call__(self, name: str | None = None, file: Path | None = None, /, **overrides: Any) -> str:
        console = Console(file=io.StringIO(), width=400)
        given = {name.replace("__", "."): value for name, value in overrides.items()}
        assert await config.show(name, file, given, False, console=console) == 0
        assert isinstance(console.file, io.StringIO)
        self.err = console.file.getvalue()
        out, err = self.capfd.readouterr()
        assert err == ""
        return out

    async def json(self, name: str | None = None, file: Path | None = None, /, **overrides: Any) -> dict[str, Any]:
        given = {name.replace("__", "."): value for name, value in overrides.items()}
        assert await config.show(name, file, given, True, console=Console(file=io.StringIO())) == 0
        out, err = self.capfd.readouterr()
        assert err == ""
        [told] = [json.loads(line) for line in out.splitlines()]
        assert isinstance(told, dict)
        return told


@pytest.fixture
def shown(capfd: pytest.CaptureFixture[str]) -> Shown:
    return Shown(capfd)


def users_file(home: Path, text: str) -> Path:
    path = home / ".config/supervise/supervise.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


async def test_each_value_is_told_with_its_origin(home: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    path = users_file(home, "kill_wait = 2\n[worker]\nroot = '/srv/agents'\n")
    monkeypatch.setenv("SUPERVISE_INDEX__MODE", "none")
    out = await shown(None, None, worker__max_concurrent="7")
    rows = {line.split()[0]: line.split(None, 1)[1].strip() for line in out.splitlines()[1:]}
    assert rows["kill_wait"].split(None, 2) == ["2", "s", f"file {path}"]
    assert rows["worker.root"].split(None, 1) == ["/srv/agents", f"file {path}"]
    assert rows["index.mode"].split(None, 1) == ["none", "environment SUPERVISE_INDEX__MODE"]
    assert rows["worker.max_concurrent"].split(None, 1) == ["7", "command line"]
    assert rows["jobs_max_age"].split(None, 2) == ["2592000", "s", "default"]
    assert rows["worker.lock_file"].split() == ["unset", "default"]
    assert "\x1b" not in out
    assert shown.err == f"supervise: {path} is read\n"


async def test_json_is_one_object_with_every_setting(home: Path, shown: Shown) -> None:
    told = await shown.json(None, None, index__startup_timeout=5)
    assert told["type"] == "config"
    assert told["file"] == {"path": str(home / ".config/supervise/supervise.toml"), "exists": False}
    assert told["settings"]["index.startup_timeout"] == {"value": 5.0, "origin": "command line", "unit": "s"}
    assert told["settings"]["agent.command"] == {"value": ["claude"], "origin": "default", "unit": ""}
    assert told["settings"]["state_dir"]["value"] == str(home / ".local/state/supervise")
    assert told["settings"]["worker.root"]["value"] is None
    assert len(told["settings"]) > 50


async def test_the_file_that_would_be_read_is_told(home: Path, shown: Shown, tmp_path: Path) -> None:
    await shown("log")
    assert f"{home}/.config/supervise/supervise.toml would be read, but does not exist" in shown.err
    named = tmp_path / "mine.toml"
    named.write_text("log.level = 'debug'")
    assert f"file {named}" in await shown("log.level", named)
    assert (await shown.json("log.level", named))["file"] == {"path": str(named), "exists": True}


async def test_no_secret_is_shown(home: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    users_file(home, f"http.token = '{KEY}1'\nagent.env = {{ PLAIN = '{KEY}2' }}")
    monkeypatch.setenv("SUPERVISE_REDIS__URL", f"redis://:{KEY}3@host")
    monkeypatch.setenv("ANTHROPIC_API_KEY", f"{KEY}4")
    given = {"index__voyage_api_key": f"{KEY}5", "agent__command": f"claude,--key,{KEY}4", "worker__root": f"/{KEY}5"}
    out = await shown(None, None, **given)
    told = await shown.json(None, None, **given)
    for text in (out, shown.err, json.dumps(told)):
        assert KEY not in text
    assert told["settings"]["agent.env"]["value"] == {"PLAIN": "***"}
    assert told["settings"]["agent.command"]["value"] == ["claude", "--key", "***"]
    for name in ("http.token", "redis.url", "index.voyage_api_key"):
        assert told["settings"][name]["value"] == "***"
        assert any(line.split()[:2] == [name, "***"] for line in out.splitlines())
    monkeypatch.delenv("SUPERVISE_REDIS__URL")
    assert (await shown.json("redis"))["settings"]["redis.url"] == {"value": None, "origin": "default", "unit": ""}


async def test_some_settings_are_chosen_by_name_or_table(home: Path, shown: Shown) -> None:
    assert [*(await shown.json("index.mode"))["settings"]] == ["index.mode"]
    assert {name.partition(".")[0] for name in (await shown.json("index"))["settings"]} == {"index"}
    assert [*(await shown.json("log."))["settings"]] == ["log.format", "log.level"]
    assert len((await shown("log")).splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("idnex", "did you mean 'index'?"),
        ("mode", "did you mean 'index.mode'?"),
        ("Index", "did you mean 'index'?"),
        ("SUPERVISE_INDEX__MODE", "did you mean 'index.mode'?"),
        ("index.mod", "did you mean 'index.mode'?"),
        ("inde", "did you mean 'index'?"),
        ("qqqqq", "supervise config lists the settings"),
        ("", "supervise config lists the settings"),
    ],
)
async def test_a_name_that_is_none_is_refused(home: Path, name: str, near: str) -> None:
    with pytest.raises(SettingsError, match="is no setting and no table of settings; ") as caught:
        await config.show(name, None, {}, False, console=Console(file=io.StringIO()))
    assert str(caught.value).endswith(near)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
async def test_a_terminal_of_any_width_shows_the_whole_values(
    home: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes that for a terminal
    monkeypatch.setattr("supervise.cli.tables.on_terminal", lambda stream: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("SUPERVISE_INDEX__MODE", "none")
    words = [f"word-{number}" for number in range(20)]
    out = await shown(None, None, agent__command=",".join(words))
    lines = [Text.from_ansi(line) for line in out.splitlines()]
    assert max(line.cell_len for line in lines) <= width
    plain = "".join("".join(line.plain.split()) for line in lines)
    if width < 76:  # in a table, values in several lines lie beside others
        assert "".join(f'"{word}",' for word in words[:-1]) in plain
        assert "environmentSUPERVISE_INDEX__MODE" in plain
    else:
        assert all(sum(word in line.plain for line in lines) for word in words[:3])
    [mode] = [line for line in out.splitlines() if "index.mode" in line]
    [other] = [line for line in out.splitlines() if "index.settle_time" in line]
    assert "\x1b[1m" in mode
    assert "\x1b[1m" not in other


async def test_off_a_terminal_no_value_is_cut(home: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    root = "/srv/" + "x" * 200
    out = await shown("worker.root", None, worker__root=root)
    assert f"worker.root  {root}  command line" in out


async def test_values_of_strangers_do_not_steer_a_terminal(home: Path, shown: Shown) -> None:
    out = await shown(None, None, worker__root="/a\x1b]0;b\x07\n[red]c", agent__env={"A\x1b": "1"})
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[red]c" in out


async def test_the_example_goes_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    assert await config.example(console=Console(file=io.StringIO())) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "\n[index]\n" in out
    assert out.startswith("# ")
    assert out.endswith("\n")


async def test_a_reader_who_has_gone_away_is_told_by_the_exit_code(home: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    saved = os.dup(1)
    os.dup2(writing, 1)
    try:
        code = await config.show(None, None, {}, False, console=Console(file=io.StringIO()))
        of_example = await config.example(console=Console(file=io.StringIO()))
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(writing)
    assert (code, of_example) == (141, 141)


def test_a_mistake_in_the_file_keeps_nothing_from_being_told(home: Path) -> None:
    users_file(home, "kill_wiat = 2")
    with pytest.raises(SettingsError, match="line 1: 'kill_wiat' is no setting; did you mean 'kill_wait'"):
        Settings.load()
