"""Settings from file, environment and command line; and what is said where they are wrong."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import attrs
import pytest

from supervise.errors import MissingExtra, SettingsError, SuperviseError
from supervise.secrets import Secret
from supervise.settings import Settings
from supervise.settings_sources import load_with_origins, settings_file

KEY = "pa-TopSecret-0123456789"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the environment that a test gives is looked at."""
    for name in [*os.environ]:
        if name.startswith(("SUPERVISE_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    return home


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def users_file(home: Path, text: str | bytes) -> Path:
    return write(home / ".config/supervise/supervise.toml", text)


def load(
    home: Path,
    env: Mapping[str, str] | None = None,
    config: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> Settings:
    return Settings.load(
        environ={"HOME": str(home), **(env or {})},
        config=config,
        overrides={name.replace("__", "."): value for name, value in overrides.items()},
    )


def refusal(*args: Any, **kwargs: Any) -> str:
    """The message of the SettingsError that `load` raises, which is one line and drags nothing along."""
    with pytest.raises(SettingsError) as caught:
        load(*args, **kwargs)
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None
    assert "\n" not in str(error)
    return str(error)


# --- precedence and origins --------------------------------------------------------------------------------


def test_without_sources_there_are_the_defaults(home: Path) -> None:
    settings, origins = load_with_origins(environ={"HOME": str(home)}, overrides={})
    assert settings == Settings(state_dir=home / ".local/state/supervise")
    assert set(origins.values()) == {"default"}


def test_each_source_beats_the_one_before(home: Path) -> None:
    path = users_file(home, "orphan_grace = 2\nheartbeat_interval = 2\nkill_wait = 2\n")
    settings, origins = load_with_origins(
        environ={
            "HOME": str(home),
            "SUPERVISE_HEARTBEAT_INTERVAL": "3",
            "SUPERVISE_KILL_WAIT": "3",
        },
        overrides={"kill_wait": 4},
    )
    assert settings.pipe_timeout == 5.0
    assert (settings.orphan_grace, settings.heartbeat_interval, settings.kill_wait) == (2.0, 3.0, 4.0)
    assert origins["pipe_timeout"] == "default"
    assert origins["orphan_grace"] == f"file {path}"
    assert origins["heartbeat_interval"] == "environment SUPERVISE_HEARTBEAT_INTERVAL"
    assert origins["kill_wait"] == "command line"


def test_origins_name_every_setting_and_lead_to_its_value(home: Path) -> None:
    settings, origins = load_with_origins(environ={"HOME": str(home)}, overrides={"index.mode": "none"})
    assert {name: attrgetter(name)(settings) for name in origins}["index.mode"] == "none"
    assert len(origins) > 40


def test_the_same_name_in_two_parts_is_two_settings(home: Path) -> None:
    settings = load(home, {"SUPERVISE_INDEX__TERMINATION_TIMEOUT": "1"}, agent__termination_timeout=2)
    assert (settings.index.termination_timeout, settings.agent.termination_timeout) == (1.0, 2.0)


# --- the file ----------------------------------------------------------------------------------------------


def test_the_users_file_is_read_from_the_configuration_directory(home: Path, tmp_path: Path) -> None:
    users_file(home, "kill_wait = 1")
    assert load(home).kill_wait == 1.0
    other = write(tmp_path / "xdg/supervise/supervise.toml", "kill_wait = 2")
    assert load(home, {"XDG_CONFIG_HOME": str(other.parents[1])}).kill_wait == 2.0


def test_without_home_the_user_database_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users_file(tmp_path, "kill_wait = 3")
    monkeypatch.setattr("supervise.settings_sources.home_of_user", lambda: tmp_path)
    assert Settings.load(environ={}).kill_wait == 3.0


def test_a_named_file_replaces_the_users(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users_file(home, "kill_wait = 1\norphan_grace = 9")
    named = write(tmp_path / "mine.conf", "kill_wait = 2")
    settings, origins = load_with_origins(config=named, environ={"HOME": str(home)}, overrides={})
    assert (settings.kill_wait, settings.orphan_grace) == (2.0, 1.0)
    assert origins["kill_wait"] == f"file {named}"
    monkeypatch.chdir(tmp_path)
    assert load(home, config="mine.conf").kill_wait == 2.0
    write(home / "mine.conf", "kill_wait = 4")
    assert load(home, config="~/mine.conf").kill_wait == 4.0


def test_a_named_file_must_exist(home: Path, tmp_path: Path) -> None:
    assert refusal(home, config=tmp_path / "none.toml").startswith(f"{tmp_path}/none.toml does not exist")
    assert "Is a directory" in refusal(home, config=tmp_path)


def test_no_file_in_the_working_directory_is_read(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    names = ("supervise.toml", ".supervise.toml", "supervise/supervise.toml", ".config/supervise/supervise.toml")
    for name in (*names, "config.toml", "config/supervise/supervise.toml"):
        write(here / name, "kill_wait = 77")
    write(here / "pyproject.toml", "[tool.supervise]\nkill_wait = 77")
    monkeypatch.chdir(here)
    assert load(home).kill_wait == 5.0
    # Relative directories are in the working directory.
    for directory in (".", "", "config", "./config", ".config", "../here"):
        assert load(home, {"XDG_CONFIG_HOME": directory}).kill_wait == 5.0
    assert load(home, {"XDG_CONFIG_HOME": str(here)}).kill_wait == 77.0  # the files are good
    monkeypatch.setattr("supervise.settings_sources.home_of_user", lambda: home)
    for directory in (".", "", "../here"):
        assert Settings.load(environ={"HOME": directory}).kill_wait == 5.0


def test_no_file_in_a_workspace_is_read(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = tmp_path / "workspace"
    for name in ("supervise.toml", ".supervise.toml", ".config/supervise/supervise.toml", ".supervise/supervise.toml"):
        write(workspace / name, "kill_wait = 77")
    (workspace / "below").mkdir()
    monkeypatch.chdir(workspace / "below")  # nor is one looked for in the directories above
    env = {"SUPERVISE_WORKER__WORKSPACE": str(workspace), "SUPERVISE_WORKER__WORKSPACES": str(tmp_path)}
    assert load(home, {**env, "SUPERVISE_WORKER__ROOT": str(workspace)}).kill_wait == 5.0
    path = users_file(home, f"worker.workspace = '{workspace}'")
    settings, origins = load_with_origins(environ={"HOME": str(home)}, overrides={})
    assert (settings.kill_wait, origins["worker.workspace"]) == (5.0, f"file {path}")


def test_the_file_that_is_read_can_be_told(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"HOME": str(home)}
    assert settings_file(None, environ) == home / ".config/supervise/supervise.toml"
    assert settings_file(None, {**environ, "XDG_CONFIG_HOME": "/x"}) == Path("/x/supervise/supervise.toml")
    assert settings_file(None, {**environ, "XDG_CONFIG_HOME": "x"}) == home / ".config/supervise/supervise.toml"
    monkeypatch.chdir(tmp_path)
    assert settings_file("a/../b.toml", environ) == tmp_path / "b.toml"
    assert settings_file("~/b.toml", environ) == home / "b.toml"


def test_a_file_speaks_toml(home: Path) -> None:
    users_file(
        home,
        """
        executor = "mock"
        agent.command = "claude"
        agent.env = { A = "1,2", B = "" }
        index.watch_enabled = false
        worker.workspaces = ["~/src", "/srv", "rel"]
        worker.lock_file = ""
        redis.url = "redis://u:p@host/0"
        """,
    )
    settings = load(home)
    assert settings.executor == "mock"
    assert settings.agent.command == ("claude",)
    assert settings.agent.env == {"A": "1,2", "B": ""}
    assert settings.index.watch_enabled is False
    # Relative paths in a file are relative to the file.
    assert settings.worker.workspaces == (home / "src", Path("/srv"), home / ".config/supervise/rel")
    assert settings.worker.lock_file is None
    assert settings.redis.url == Secret("redis://u:p@host/0")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a = 1\nb = = 2\n", "line 2, column 5"),
        ("[index]\nmode = 'cidx'\nmode = 'none'\n", "line 3, column 14"),
        ("a = [1,\n2", "line 2, column 2"),
        (b"a = 1\nb = 'x\xff'\n", "line 2, column 7"),
    ],
)
def test_toml_that_does_not_parse_is_told_with_its_place(home: Path, text: str | bytes, place: str) -> None:
    path = users_file(home, text)
    message = refusal(home)
    assert message.startswith(f"{path} is no TOML: ")
    assert f"(at {place}" in message


@pytest.mark.parametrize("text", ["a = " + "9" * 5000, "a = " + "[" * 5000])
def test_toml_past_all_bounds_is_told(home: Path, text: str) -> None:
    path = users_file(home, text)
    assert refusal(home).startswith(f"{path} ")


def test_a_file_that_cannot_be_read_is_told(home: Path) -> None:
    path = users_file(home, "")
    path.unlink()
    path.mkdir()
    assert refusal(home) == f"{path} cannot be read: Is a directory"
    path.rmdir()
    path.symlink_to(path)
    assert refusal(home).startswith(f"{path} cannot be read: ")


def test_a_file_where_the_configuration_directory_would_be_is_no_file_of_ours(home: Path) -> None:
    write(home / ".config", "")
    assert load(home).kill_wait == 5.0


# --- the environment ---------------------------------------------------------------------------------------

#: Every name that others rely on, a text for it, and what it is.
NAMES: dict[str, tuple[str, Any]] = {
    "state_dir": ("/var/lib/s", Path("/var/lib/s")),
    "executor": ("redis", "redis"),
    "agent.command": ("claude,-p", ("claude", "-p")),
    "agent.termination_timeout": ("1.5", 1.5),
    "agent.pass_env": ("FOO, BAR", ("FOO", "BAR")),
    "agent.env": ("A=1,B=x=y", {"A": "1", "B": "x=y"}),
    "agent.exit_linger": ("0", 0.0),
    "orphan_grace": ("0", 0.0),
    "index.mode": ("cidx", "cidx"),
    "index.command": ('["python", "-m", "cidx"]', ("python", "-m", "cidx")),
    "index.watch_enabled": ("no", False),
    "index.startup_timeout": ("5", 5.0),
    "index.assume_fresh": ("1", True),
    "index.settle_time": ("3", 3.0),
    "index.flush_timeout": ("3", 3.0),
    "index.termination_timeout": ("3", 3.0),
    "index.fallback_to_reconcile": ("off", False),
    "index.reconcile_timeout": ("1e3", 1000.0),
    "index.reconcile_on_cancel": ("TRUE", True),
    "index.voyage_api_key": (KEY, Secret(KEY)),
    "heartbeat_interval": ("2", 2.0),
    "worker.root": ("/srv/root", Path("/srv/root")),
    "worker.workspace": ("/srv/w", Path("/srv/w")),
    "worker.workspaces": ("/a,/b", (Path("/a"), Path("/b"))),
    "worker.max_concurrent": ("7", 7),
    "worker.max_attempts": ("9", 9),
    "worker.backoff_base": ("2", 2.0),
    "worker.backoff_cap": ("60", 60.0),
    "worker.lock_file": ("/run/s.lock", Path("/run/s.lock")),
    "worker.drain_timeout": ("0", 0.0),
    "breaker.failures": ("2", 2),
    "breaker.reset_after": ("30", 30.0),
    "redis.url": ("redis://h", Secret("redis://h")),
    "http.host": ("::1", "::1"),
    "http.port": ("0", 0),
    "http.token": (KEY, Secret(KEY)),
}


def variable(name: str) -> str:
    return "SUPERVISE_" + name.upper().replace(".", "__")


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_taken_from_the_environment(home: Path, name: str) -> None:
    text, value = NAMES[name]
    default = attrgetter(name)(load(home))
    settings, origins = load_with_origins(environ={"HOME": str(home), variable(name): text}, overrides={})
    got = attrgetter(name)(settings)
    assert got == value
    assert type(got) is type(value)
    assert got != default
    assert origins[name] == f"environment {variable(name)}"
    assert [*origins.values()].count("default") == len(origins) - 1


def test_all_names_at_once_and_from_the_command_line_as_texts(home: Path) -> None:
    in_environment = load(home, {variable(name): text for name, (text, _) in NAMES.items()})
    overrides = {name: text for name, (text, _) in NAMES.items()}
    assert Settings.load(environ={"HOME": str(home)}, overrides=overrides) == in_environment


def test_settings_come_from_the_process_environment_by_default(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SUPERVISE_INDEX__STARTUP_TIMEOUT", "5")
    assert Settings.load().index.startup_timeout == 5.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("claude", ("claude",)),
        ("/opt/my tools/claude", ("/opt/my tools/claude",)),
        ("a,b", ("a", "b")),
        (" a , b c ", ("a", "b c")),
        ('["python","-m","x"]', ("python", "-m", "x")),
        (' ["a,b"]', ("a,b",)),
    ],
)
def test_a_command_is_a_word_or_a_list(home: Path, text: str, words: tuple[str, ...]) -> None:
    assert load(home, {"SUPERVISE_AGENT__COMMAND": text}).agent.command == words


@pytest.mark.parametrize("text", ["true", "1", "yes", "on", "True", "ON", " yes "])
def test_texts_that_are_true(home: Path, text: str) -> None:
    assert load(home, {"SUPERVISE_INDEX__ASSUME_FRESH": text}).index.assume_fresh is True


@pytest.mark.parametrize("text", ["false", "0", "no", "off", "FALSE", "Off"])
def test_texts_that_are_false(home: Path, text: str) -> None:
    assert load(home, {"SUPERVISE_INDEX__WATCH_ENABLED": text}).index.watch_enabled is False


def test_an_environment_for_the_agent_is_json_or_pairs(home: Path) -> None:
    assert load(home, {"SUPERVISE_AGENT__ENV": '{"A": "1,2", "B": "="}'}).agent.env == {"A": "1,2", "B": "="}
    assert load(home, {"SUPERVISE_AGENT__ENV": "A=1, B=2=3"}).agent.env == {"A": "1", "B": "2=3"}
    assert load(home, {"SUPERVISE_AGENT__ENV": ""}).agent.env == {}


def test_an_empty_text_unsets_what_is_optional(home: Path) -> None:
    users_file(home, "worker.root = '/a'\nindex.voyage_api_key = 'key'\nagent.pass_env = ['A']")
    settings = load(
        home,
        {"SUPERVISE_WORKER__ROOT": "", "SUPERVISE_INDEX__VOYAGE_API_KEY": "", "SUPERVISE_AGENT__PASS_ENV": ""},
    )
    assert settings.worker.root is None
    assert settings.index.voyage_api_key is None
    assert settings.agent.pass_env == ()


def test_paths_are_made_absolute(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load(home, {"SUPERVISE_STATE_DIR": "~/state", "SUPERVISE_WORKER__WORKSPACES": "~,rel/../b,~root/x"})
    assert settings.state_dir == home / "state"
    assert settings.worker.workspaces == (home, tmp_path / "b", Path("~root/x").expanduser())
    assert load(home, worker__root=Path("~/r")).worker.root == home / "r"


def test_the_state_directory_follows_xdg(home: Path) -> None:
    assert load(home).state_dir == home / ".local/state/supervise"
    assert load(home, {"XDG_STATE_HOME": "/var/state"}).state_dir == Path("/var/state/supervise")
    assert load(home, {"XDG_STATE_HOME": "state"}).state_dir == home / ".local/state/supervise"
    assert Settings.load(environ={}).state_dir == Settings().state_dir


# --- unknown names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("SUPERVISE_INDEX__STARTUP_TIMOUT", "SUPERVISE_INDEX__STARTUP_TIMEOUT"),
        ("SUPERVISE_INDEX_STARTUP_TIMEOUT", "SUPERVISE_INDEX__STARTUP_TIMEOUT"),
        ("SUPERVISE_KILLWAIT", "SUPERVISE_KILL_WAIT"),
        ("SUPERVISE_STARTUP_TIMEOUT", "SUPERVISE_INDEX__STARTUP_TIMEOUT"),
        ("SUPERVISE_AGENT__MODE", "SUPERVISE_INDEX__MODE"),
        ("SUPERVISE_worker__root", "SUPERVISE_WORKER__ROOT"),
    ],
)
def test_unknown_names_in_the_environment(home: Path, name: str, near: str) -> None:
    message = refusal(home, {name: KEY})
    assert message.startswith(f"environment: '{name}' is no setting; ")
    assert message.endswith(f"did you mean '{near}'?")
    assert KEY not in message


def test_other_names_in_the_environment_are_not_ours(home: Path) -> None:
    assert load(home, {"SUPERVISE_MARK": "abc", "SUPERVISED": "1", "supervise_x": "1"}) == load(home)


@pytest.mark.parametrize(
    ("text", "line", "name", "near"),
    [
        ("[index]\nstartup_timout = 5", 2, "index.startup_timout", "'index.startup_timeout'"),
        ("[index]\nstartup-timeout = 5", 2, "index.startup-timeout", "'index.startup_timeout'"),
        ("startup_timeout = 5", 1, "startup_timeout", "'index.startup_timeout'"),
        ("[agent]\nmode = 'none'", 2, "agent.mode", "'index.mode'"),
        ("# mine\n\nroot = '/a'", 3, "root", "'worker.root'"),
        (
            "termination_timeout = 5",
            1,
            "termination_timeout",
            "'agent.termination_timeout' or 'index.termination_timeout'",
        ),
        ("[worker]\nvoyage_api_kye = ''", 2, "worker.voyage_api_kye", "'index.voyage_api_key'"),
        ("Kill_Wait = 5", 1, "Kill_Wait", "'kill_wait'"),
        ("[index]\nMode = 'none'", 2, "index.Mode", "'index.mode'"),
        ("[Index]\nmode = 'none'", 1, "Index", "'index'"),
        ("[idnex]\nmode = 'none'", 1, "idnex", "'index'"),
        ("statedir = '/a'", 1, "statedir", "'state_dir'"),
    ],
)
def test_unknown_names_in_the_file(home: Path, text: str, line: int, name: str, near: str) -> None:
    path = users_file(home, text)
    assert refusal(home) == f"{path}, line {line}: '{name}' is no setting; did you mean {near}?"


def test_names_like_no_other_point_to_the_list(home: Path) -> None:
    users_file(home, "qqq = 1")
    assert refusal(home).endswith("'qqq' is no setting; docs/settings.md lists the settings")


def test_a_table_is_a_table(home: Path) -> None:
    path = users_file(home, "index = 'cidx'")
    assert refusal(home) == f"{path}, line 1: 'index' must be a table, written as [index]"
    users_file(home, "'index.mode' = 'cidx'")
    assert refusal(home) == f"{path}, line 1: write 'index.mode' without quotes, or as 'mode' under [index]"


def test_unknown_names_on_the_command_line(home: Path) -> None:
    message = refusal(home, index__mod="cidx")
    assert message == "command line: 'index.mod' is no setting; did you mean 'index.mode'?"
    assert refusal(home, mode="cidx").endswith("did you mean 'index.mode'?")
    assert refusal(home, Index__Mode="cidx").endswith("did you mean 'index.mode'?")
    assert refusal(home, kill__wait="cidx").endswith("did you mean 'kill_wait'?")
    assert refusal(home, AGENT__TERMINATION_TIMEOUT=1).endswith("did you mean 'agent.termination_timeout'?")
    assert refusal(home, url="cidx").endswith("did you mean 'redis.url'?")


# --- bad values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("index.startup_timeout", "soon", ["'soon'", "a number of seconds, 0 or more"]),
        ("index.startup_timeout", "-1", ["-1.0", "a number of seconds, 0 or more"]),
        ("index.startup_timeout", "", ["''", "a number of seconds"]),
        ("kill_wait", "nan", ["nan", "a number of seconds above 0"]),
        ("index.mode", "cdix", ["'cdix'", "one of auto, cidx, none"]),
        ("index.watch_enabled", "maybe", ["'maybe'", "true or false"]),
        ("worker.max_concurrent", "2.5", ["'2.5'", "a whole number, 1 or more"]),
        ("http.port", "65536", ["65536", "from 0 to 65535"]),
        ("agent.command", "", ["a program and its arguments"]),
        ("agent.command", "a,,b", ["('a', '', 'b')", "a program and its arguments"]),
        ("agent.command", '["a",', ["a JSON list of texts", "line 1, column 6"]),
        ("agent.command", "[1]", ["[1]".strip("[]"), "a program and its arguments"]),
        ("agent.command", "[" * 100_000, ["a JSON list of texts"]),
        ("agent.pass_env", "A=1", ["'A=1'", "a list of names"]),
        ("agent.env", "A", ["A=1,B=2 or a JSON object"]),
        ("agent.env", '{"A": 1}', ["names and texts"]),
        ("state_dir", "", ["''", "a path"]),
    ],
)
def test_bad_values_in_the_environment(home: Path, name: str, text: str, parts: list[str]) -> None:
    message = refusal(home, {variable(name): text})
    assert message.startswith(name)
    assert message.endswith(f" (environment {variable(name)})")
    for part in parts:
        assert part in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("text", "name", "allowed"),
    [
        ("kill_wait = '5'", "kill_wait is '5'", "a number of seconds above 0"),
        ("index.watch_enabled = 'yes'", "index.watch_enabled is 'yes'", "true or false"),
        ("index.mode = {}", "index.mode is {}", "one of auto, cidx, none"),
        ("agent.pass_env = 'A,B'", "agent.pass_env is 'A,B'", "a list of names"),
        ("worker.workspaces = '/a'", "worker.workspaces is", "a list of paths"),
        ("worker.root = 5", "worker.root is 5", "a path"),
        ("worker.workspaces = ['/a', 5]", "worker.workspaces is (", "a list of paths"),
        ("worker.max_concurrent = 2.0", "worker.max_concurrent is 2.0", "a whole number, 1 or more"),
        ("worker.max_concurrent = true", "worker.max_concurrent is True", "a whole number, 1 or more"),
        ("worker.metrics_port = '80'", "worker.metrics_port is '80'", "a port from 0 to 65535"),
        ("kill_wait = true", "kill_wait is True", "a number of seconds above 0"),
        ("kill_wait = inf", "kill_wait is inf", "a number of seconds above 0"),
        ("agent.command = ['claude', 1]", "agent.command is ('claude', 1)", "a program and its arguments"),
        ("agent.env = ['A=1']", "agent.env", "names and texts without NUL"),
        ("http.token = 5", "http.token", "a text without NUL"),
        ("http.host = 5", "http.host is 5", "an address or a name"),
        ("log.level = 'loud'", "log.level is 'loud'", "one of debug, info, warning, error"),
        ('worker.root = "a\\u0000b"', "worker.root is", "a path"),
        ("orphan_grace = 2020-01-01", "orphan_grace is datetime.date(2020, 1, 1)", "a number of seconds"),
    ],
)
def test_bad_values_in_the_file(home: Path, text: str, name: str, allowed: str) -> None:
    path = users_file(home, text)
    message = refusal(home)
    assert message.startswith(name)
    assert f"must be {allowed}" in message
    assert message.endswith(f" (file {path}, line 1)")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# a\n\n[index]\n# mode\nmode = 5\n[agent]\n", ", line 5"),
        ("index.mode = 5", ", line 1"),
        ("orphan_grace = 1\nindex = { settle_time = 1, mode = 5 }\n", ", line 2"),
        ("[agent]\ncommand = [\n 'x',\n # mode\n]\n[index]\n mode = [\n 1,\n 2\n]\n", ", line 7"),
        ("[agent]\ncommand = '''\nindex.mode = 5\n[index]\nmode = 5'''\n[index]\r\nmode = 5\r\n", ", line 7"),
        ("[agent]\ncommand = 'a\x85b\u2028c'\n[index]\nmode = 5\n", ", line 4"),
        ("index.mode = 5 #" + 65536 * " ", ""),
    ],
)
def test_the_line_of_a_bad_value_is_told(home: Path, text: str, line: str) -> None:
    path = users_file(home, text)
    message = refusal(home)
    assert message.startswith("index.mode is ")
    assert message.endswith(f"one of auto, cidx, none (file {path}{line})")


def test_bad_values_on_the_command_line(home: Path) -> None:
    assert refusal(home, kill_wait=0) == "kill_wait is 0, but must be a number of seconds above 0 (command line)"
    assert refusal(home, index__assume_fresh=2).endswith("must be true or false (command line)")


def test_a_relative_path_needs_a_working_directory(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert load(home).kill_wait == 5.0
    assert "the working directory is gone" in refusal(home, {"SUPERVISE_STATE_DIR": "state"})
    assert "the working directory is gone" in refusal(home, config="supervise.toml")


# --- secrets -----------------------------------------------------------------------------------------------

SECRETS = ["index.voyage_api_key", "redis.url", "http.token"]


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_do_not_show(home: Path, name: str) -> None:
    settings = load(home, {variable(name): KEY, "SUPERVISE_AGENT__ENV": f"TOKEN={KEY}"})
    assert attrgetter(name)(settings).reveal() == KEY
    part = attrgetter(name.partition(".")[0])(settings)
    for shown in (str(settings), repr(settings), f"{settings}", f"{part!s} {part!r}", repr([settings.agent])):
        assert KEY not in shown
    assert "TOKEN" in repr(settings)


@pytest.mark.parametrize(
    "source",
    [
        *[{"text": f"{name} = ['{KEY}']"} for name in SECRETS],
        *[{"text": f'{name} = "{KEY}\\u0000"'} for name in SECRETS],
        {"text": f"index.voyage_api_key = '{KEY}'\nkill_wait = 'x'"},
        {"text": f"index.voyage_api_key = '{KEY}"},
        {"text": f"index.voyage_api_key = {KEY}"},
        {"text": f"index.voyage_api_key = '{KEY}'\nx = '\xff'".encode("latin-1")},
        {"text": f"agent.env = {{ TOKEN = ['{KEY}'] }}"},
        {"env": {"SUPERVISE_AGENT__ENV": KEY}},
        {"env": {"SUPERVISE_AGENT__ENV": f'{{"TOKEN": ["{KEY}"]}}'}},
        {"env": {"SUPERVISE_AGENT__ENV": f'{{"TOKEN": "{KEY}'}},
        {"env": {"SUPERVISE_AGENT__ENV": f"TOKEN={KEY},={KEY}"}},
        {"env": {"SUPERVISE_INDEX__VOYAGE_KEY": KEY}},
        {"env": {"SUPERVISE_INDEX__VOYAGE_API_KEY": KEY, "SUPERVISE_KILL_WAIT": "x"}},
    ],
    ids=str,
)
def test_secrets_do_not_show_in_errors(home: Path, source: dict[str, Any]) -> None:
    if "text" in source:
        users_file(home, source["text"])
    with pytest.raises(SettingsError) as caught:
        Settings.load(environ={"HOME": str(home), **source.get("env", {})})
    shown = "".join(traceback.format_exception(caught.value))
    assert KEY not in shown
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert KEY not in repr(caught.value)


def test_secrets_do_not_show_in_tracebacks_with_variables(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tools print the variables of each frame. What the caller handed over is in the caller's own frames."""
    for name in SECRETS:
        monkeypatch.setenv(variable(name), KEY)
    monkeypatch.setenv("HOME", str(home))
    users_file(home, f"http.token = '{KEY}'\nagent.env = {{ TOKEN = '{KEY}' }}\nkill_wait = 'x'")
    for read in (Settings.load, lambda: load_with_origins(environ=os.environ, overrides={})):
        with pytest.raises(SettingsError) as caught:
            read()
        shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
        assert "kill_wait is 'x'" in shown
        assert "settings_sources" in shown
        assert KEY not in shown


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_do_not_show_in_logs_and_copies(
    home: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(home, {variable(name): KEY})
    value = attrgetter(name)(settings)
    logging.getLogger("supervise.test").warning("%s %r %s", settings, value, {"settings": settings})
    copy = attrs.evolve(settings, kill_wait=1.0)
    as_dict = attrs.asdict(settings)
    for shown in (caplog.text, repr(copy), str(as_dict), f"{value}", f"{value!r:>5}", str([value])):
        assert KEY not in shown
    assert "***" in str(as_dict)
    assert "***" in caplog.text


# --- the extra ---------------------------------------------------------------------------------------------


def test_without_typed_settings_the_extra_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from supervise.settings_sources import _options

    _options.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "typed_settings"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typed_settings", None)
    with pytest.raises(MissingExtra, match=r"reading settings needs .*'typed-settings'.*trio-supervise\[cli\]"):
        load(home)
    assert issubclass(MissingExtra, SuperviseError)
    assert Settings().kill_wait == 5.0  # the values themselves need nothing
