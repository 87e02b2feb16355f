"""What a child sees of our environment: the names that it needs, and no others.

The agent's key goes to the agent, the embedding key to the index, and neither to the other.
"""

from __future__ import annotations

import pwd
import re
from collections.abc import Mapping
from fnmatch import translate
from functools import lru_cache

from supervise.model import JobSpec
from supervise.settings import AgentSettings, IndexSettings

COMMON = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TERM", "TMPDIR", "XDG_*"),
    *("*_PROXY", "*_proxy", "SSL_CERT_*", "NODE_EXTRA_CA_CERTS"),
)
AGENT = ("ANTHROPIC_*", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CONFIG_DIR")
INDEX = ("VOYAGE_API_KEY",)

#: Of the user who runs us; another user must not get them.
PERSONAL = ("XDG_*", "TMPDIR", "CLAUDE_CONFIG_DIR")


def agent_environment(ours: Mapping[str, str], settings: AgentSettings, spec: JobSpec) -> dict[str, str]:
    """The agent's environment: what is allowed of ours, then `agent.env`, then the spec's."""
    env = _allowed(ours, (*COMMON, *AGENT), spec.user)
    env |= {name: ours[name] for name in settings.pass_env if name in ours}
    return {**env, **settings.env, **spec.env}


def index_environment(ours: Mapping[str, str], settings: IndexSettings, user: str | None) -> dict[str, str]:
    """The index's environment: as the agent's, without its keys, plus its own key."""
    env = _allowed(ours, (*COMMON, *INDEX), user)
    if settings.voyage_api_key:
        env["VOYAGE_API_KEY"] = settings.voyage_api_key.reveal()
    return env


def _allowed(ours: Mapping[str, str], patterns: tuple[str, ...], user: str | None) -> dict[str, str]:
    env = _matching(ours, patterns)
    if user is None:
        return env
    env = {name: value for name, value in env.items() if name not in _matching(env, PERSONAL)}
    try:
        entry = pwd.getpwnam(user)
    except (KeyError, ValueError):  # no such user, or not even a name
        return env  # the spawn says that there is no such user
    return {**env, "HOME": entry.pw_dir, "USER": user, "LOGNAME": user, "SHELL": entry.pw_shell or "/bin/sh"}


def _matching(env: Mapping[str, str], patterns: tuple[str, ...]) -> dict[str, str]:
    match = _compiled(patterns).match
    return {name: value for name, value in env.items() if match(name)}


@lru_cache(8)
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)))
