"""What a child sees of our environment."""

from __future__ import annotations

import getpass
import os
import pwd
from pathlib import Path
from typing import Any

from supervise import AgentSettings, IndexSettings, JobSpec, Secret
from supervise.job.environment import agent_environment, index_environment

SHARED = {
    "PATH": "/bin",
    "HOME": "/home/me",
    "USER": "me",
    "LOGNAME": "me",
    "SHELL": "/bin/sh",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "LC_TIME": "C",
    "TERM": "xterm",
    "TMPDIR": "/var/tmp",
    "XDG_RUNTIME_DIR": "/run/user/1",
    "XDG_CONFIG_HOME": "/home/me/.config",
    "HTTP_PROXY": "http://proxy",
    "HTTPS_PROXY": "http://proxy",
    "NO_PROXY": "localhost",
    "http_proxy": "http://proxy",
    "SSL_CERT_FILE": "/etc/cert.pem",
    "SSL_CERT_DIR": "/etc/certs",
    "NODE_EXTRA_CA_CERTS": "/etc/ca.pem",
}
AGENTS = {
    "ANTHROPIC_API_KEY": "agent-key",
    "ANTHROPIC_BASE_URL": "http://127.0.0.1",
    "CLAUDE_CODE_OAUTH_TOKEN": "agent-token",
    "CLAUDE_CONFIG_DIR": "/home/me/.claude",
}
INDEXES = {"VOYAGE_API_KEY": "index-key"}
NOBODYS = {
    "AWS_SECRET_ACCESS_KEY": "x",
    "GITHUB_TOKEN": "x",
    "SUPERVISE_HTTP__TOKEN": "x",
    "SUPERVISE_MARK": "outer",
    "LD_PRELOAD": "/evil.so",
    "PYTHONPATH": "/evil",
    "MY_PATH": "x",
    "PATHS": "x",
    "LC": "x",
    "XDG": "x",
    "anthropic_api_key": "x",
    "CLAUDE_CODE_OTHER": "x",
    "IS_SANDBOX": "1",
    "": "x",
}
OURS = {**SHARED, **AGENTS, **INDEXES, **NOBODYS}

NOT_ANOTHERS = {"XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "TMPDIR"}


def spec(**more: Any) -> JobSpec:
    return JobSpec(prompt="x", workspace=Path("/"), **more)


def test_the_agent_gets_what_is_allowed_and_no_more() -> None:
    assert agent_environment(OURS, AgentSettings(), spec()) == {**SHARED, **AGENTS}


def test_the_index_gets_no_key_of_the_agent() -> None:
    assert index_environment(OURS, IndexSettings(), None) == {**SHARED, **INDEXES}


def test_nothing_is_made_up() -> None:
    assert agent_environment({}, AgentSettings(), spec()) == {}
    assert index_environment({}, IndexSettings(), None) == {}


def test_the_key_in_the_settings_comes_first_and_goes_to_the_index_alone() -> None:
    settings = IndexSettings(voyage_api_key=Secret("from settings"))
    assert index_environment(OURS, settings, None)["VOYAGE_API_KEY"] == "from settings"
    assert index_environment({}, settings, None) == {"VOYAGE_API_KEY": "from settings"}
    assert "from settings" not in agent_environment(OURS, AgentSettings(), spec(index=settings)).values()


def test_what_the_user_asks_for() -> None:
    settings = AgentSettings(
        pass_env=("GITHUB_TOKEN", "NOT_THERE"), env={"A": "settings", "B": "settings", "TERM": "dumb"}
    )
    env = agent_environment(OURS, settings, spec(env={"B": "spec", "LANG": "de"}))
    assert env == {
        **SHARED,
        **AGENTS,
        "GITHUB_TOKEN": "x",
        "A": "settings",
        "B": "spec",
        "TERM": "dumb",
        "LANG": "de",
    }


def test_pass_env_takes_names_not_patterns() -> None:
    assert "GITHUB_TOKEN" not in agent_environment(OURS, AgentSettings(pass_env=("GITHUB_*",)), spec())


def test_another_user_gets_their_own_home_and_nothing_personal_of_ours() -> None:
    me = pwd.getpwuid(os.getuid())
    own = {"HOME": me.pw_dir, "USER": me.pw_name, "LOGNAME": me.pw_name, "SHELL": me.pw_shell or "/bin/sh"}
    shared = {name: value for name, value in SHARED.items() if name not in NOT_ANOTHERS}
    agents = {name: value for name, value in AGENTS.items() if name != "CLAUDE_CONFIG_DIR"}
    assert agent_environment(OURS, AgentSettings(), spec(user=me.pw_name)) == {**shared, **agents, **own}
    assert index_environment(OURS, IndexSettings(), me.pw_name) == {**shared, **INDEXES, **own}


def test_what_is_asked_for_comes_before_another_users_own() -> None:
    user = getpass.getuser()
    env = agent_environment(OURS, AgentSettings(pass_env=("TMPDIR",)), spec(user=user, env={"HOME": "/elsewhere"}))
    assert (env["TMPDIR"], env["HOME"]) == ("/var/tmp", "/elsewhere")


def test_a_user_that_is_none_is_left_to_the_spawn() -> None:
    env = agent_environment(OURS, AgentSettings(), spec(user="no-such-user-here"))
    assert env["HOME"] == "/home/me"
    assert not NOT_ANOTHERS & env.keys()


def test_our_own_environment_is_not_touched() -> None:
    ours = dict(OURS)
    env = agent_environment(ours, AgentSettings(), spec(env={"X": "Y"}))
    env["HOME"] = "/changed"
    assert ours == OURS


def test_values_that_are_not_utf8_pass_as_they_are() -> None:
    ours = {"PATH": "/b\udcffn", "ANTHROPIC_API_KEY": "caf\udce9"}
    assert agent_environment(ours, AgentSettings(), spec()) == ours
