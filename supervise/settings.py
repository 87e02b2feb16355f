"""One tree of settings. Values only: `Settings()` reads nothing; `Settings.load()` reads file and environment.

Every bound in the library is here, with its unit. The names are those of the environment
(`SUPERVISE_INDEX__STARTUP_TIMEOUT=5`) and of the TOML file (`[index] startup_timeout = 5`).
"""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from attrs import Factory, field, frozen

from supervise.errors import SettingsError
from supervise.rules import Validator, rules
from supervise.secrets import Secret

__all__ = [
    "AgentSettings",
    "BreakerSettings",
    "HttpSettings",
    "IndexSettings",
    "RedisSettings",
    "Settings",
    "WorkerSettings",
]

_r = rules(SettingsError)


def _setting(
    default: Any, help: str, *, unit: str = "", validator: Validator | None = None, converter: Any = None
) -> Any:
    return field(
        default=default,
        validator=validator,
        converter=converter,
        metadata={"help": help, "unit": unit},
        kw_only=True,
    )


def _seconds(default: float, help: str, *, zero: bool = False) -> Any:
    rule = _r.not_negative("seconds") if zero else _r.positive("seconds")
    return _setting(default, help, unit="s", validator=rule)


def _words(value: str | Sequence[str]) -> tuple[str, ...]:
    """A command: a program, or a program and its first arguments."""
    return (value,) if isinstance(value, str) else tuple(value)


def _names(value: Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise SettingsError(f"a list of names is wanted, not the text {value!r}: write [{value!r}]")
    return tuple(value)


def _secret(value: str | Secret | None) -> Secret | None:
    return Secret(value) if isinstance(value, str) else value


def _path(value: str | os.PathLike[str] | None) -> Path | None:
    return None if value is None else Path(value)


def _paths(value: Sequence[str | os.PathLike[str]]) -> tuple[Path, ...]:
    return tuple(Path(item) for item in _names(value))  # type: ignore[arg-type]  # paths are names here


def _env(value: Mapping[str, str]) -> dict[str, str]:
    return dict(value)


def _shown_env(value: Mapping[str, str]) -> str:
    """Names only: a value in an environment may be a secret."""
    return "{" + ", ".join(f"{name!r}: …" for name in value) + "}"


_command = _r.check(
    lambda v: bool(v) and all(isinstance(w, str) and w and "\0" not in w for w in v),
    "a program and its arguments",
)
_environment = _r.check(
    lambda v: all(
        isinstance(n, str) and n and "=" not in n and "\0" not in n and isinstance(t, str) and "\0" not in t
        for n, t in v.items()
    ),
    "names and texts without NUL, names without '='",
    hide=True,
)


def home_of_user() -> Path:
    """The home of the user that runs this process, from the user database (not from the environment)."""
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:  # a user id without an entry, as containers have them
        return Path(tempfile.gettempdir()) / f"supervise-{os.getuid()}"


@frozen
class AgentSettings:
    """How the agent is run."""

    PATH: ClassVar[str] = "agent"

    command: tuple[str, ...] = _setting(
        ("claude",), "program (and first arguments) of the agent's CLI", converter=_words, validator=_command
    )
    termination_timeout: float = _seconds(10.0, "between SIGTERM and SIGKILL to the agent's tree", zero=True)
    pass_env: tuple[str, ...] = _setting(
        (), "names of further environment variables that the agent gets", converter=_names
    )
    env: dict[str, str] = field(
        factory=dict,
        converter=_env,
        validator=_environment,
        repr=_shown_env,
        kw_only=True,
        metadata={"help": "further environment of the agent, name to value", "unit": ""},
    )
    exit_linger: float = _seconds(
        30.0, "silence after a good last result, after which the agent is stopped", zero=True
    )
    max_line: int = _setting(
        64 * 1024 * 1024,
        "longest line of the agent's output that is understood",
        unit="B",
        validator=_r.count(1024),
    )


@frozen
class IndexSettings:
    """The code index that lives beside the agent."""

    PATH: ClassVar[str] = "index"

    mode: Literal["auto", "cidx", "none"] = _setting(
        "auto",
        "cidx, none, or auto: cidx where the workspace holds .code-indexer/",
        validator=_r.one_of("auto", "cidx", "none"),
    )
    command: tuple[str, ...] = _setting(
        ("cidx",), "program (and first arguments) of the indexer", converter=_words, validator=_command
    )
    watch_enabled: bool = _setting(True, "run `cidx watch` beside the agent")
    startup_timeout: float = _seconds(30.0, "how long the agent waits for the index at most", zero=True)
    assume_fresh: bool = _setting(False, "take a workspace that was never seen before for indexed")
    settle_time: float = _seconds(
        2.0, "a watch that has lived so long lets the agent start, untrusted", zero=True
    )
    flush_timeout: float = _seconds(5.0, "between SIGINT (flush) and SIGTERM to the watch", zero=True)
    termination_timeout: float = _seconds(10.0, "between SIGTERM and SIGKILL to the watch's tree", zero=True)
    fallback_to_reconcile: bool = _setting(True, "reconcile when the watch cannot be trusted")
    reconcile_timeout: float = _seconds(600.0, "longest `cidx index --reconcile`")
    reconcile_on_cancel: bool = _setting(False, "reconcile also after the job was cancelled")
    command_timeout: float = _seconds(30.0, "longest `cidx start`, `fix-config` and `stop`, each")
    voyage_api_key: Secret | None = _setting(
        None, "key of the embedding service; the index alone gets it", converter=_secret
    )


@frozen
class WorkerSettings:
    """The worker that takes tasks from a directory."""

    PATH: ClassVar[str] = "worker"

    root: Path | None = _setting(None, "directory that holds tasks/, running/, results/ …", converter=_path)
    workspace: Path | None = _setting(None, "workspace of tasks that name none", converter=_path)
    workspaces: tuple[Path, ...] = _setting(
        (), "directories under which a task's workspace may lie", converter=_paths
    )
    max_concurrent: int = _setting(3, "jobs at a time", validator=_r.count(1))
    max_attempts: int = _setting(3, "attempts at a task", validator=_r.count(1))
    backoff_base: float = _seconds(1.0, "first pause before a retry")
    backoff_cap: float = _seconds(300.0, "longest pause before a retry")
    lock_file: Path | None = _setting(None, "lock file of the single instance", converter=_path)
    drain_timeout: float = _seconds(600.0, "how long a draining worker waits for its jobs", zero=True)


@frozen
class BreakerSettings:
    """The circuit breaker."""

    PATH: ClassVar[str] = "breaker"

    failures: int = _setting(5, "consecutive failures that open the breaker", validator=_r.count(1))
    reset_after: float = _seconds(60.0, "how long an open breaker waits before its probe")


@frozen
class RedisSettings:
    """The Redis that carries requests past one machine."""

    PATH: ClassVar[str] = "redis"

    url: Secret | None = _setting(None, "address, such as redis://127.0.0.1:6379/0", converter=_secret)


@frozen
class HttpSettings:
    """The HTTP pages."""

    PATH: ClassVar[str] = "http"

    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8787, "port to listen on, 0 for any", validator=_r.count(0))
    token: Secret | None = _setting(None, "bearer token that callers must show", converter=_secret)


@frozen
class Settings:
    """All settings, with their defaults. Immutable; `attrs.evolve` makes a changed copy."""

    PATH: ClassVar[str] = ""

    state_dir: Path = _setting(
        Factory(lambda: home_of_user() / ".local" / "state" / "supervise"),
        "where stale marks, results, heartbeats and logs are kept",
        converter=Path,
    )
    executor: Literal["local", "mock", "redis", "http"] = _setting(
        "local",
        "who runs jobs: local, mock, redis or http",
        validator=_r.one_of("local", "mock", "redis", "http"),
    )
    orphan_grace: float = _seconds(
        1.0, "between SIGTERM and SIGKILL for children whose supervisor died", zero=True
    )
    heartbeat_interval: float = _seconds(10.0, "between two heartbeats of a job")
    kill_wait: float = _seconds(5.0, "how long a tree is waited for after SIGKILL")
    pipe_timeout: float = _seconds(5.0, "how long output is read after the tree is empty", zero=True)
    log_max_bytes: int = _setting(
        100 * 1024 * 1024,
        "size of each output log; past it, head and tail are kept",
        unit="B",
        validator=_r.count(65536),
    )
    tail_bytes: int = _setting(
        64 * 1024, "size of the output tails in a result", unit="B", validator=_r.count(0)
    )
    agent: AgentSettings = field(factory=AgentSettings, kw_only=True)
    index: IndexSettings = field(factory=IndexSettings, kw_only=True)
    worker: WorkerSettings = field(factory=WorkerSettings, kw_only=True)
    breaker: BreakerSettings = field(factory=BreakerSettings, kw_only=True)
    redis: RedisSettings = field(factory=RedisSettings, kw_only=True)
    http: HttpSettings = field(factory=HttpSettings, kw_only=True)

    @classmethod
    def load(
        cls,
        *,
        config: str | os.PathLike[str] | None = None,
        environ: Mapping[str, str] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Settings:
        """Settings from defaults < the user's TOML < environment < `overrides`.

        Args:
            config: the TOML file to read. Without it, `supervise/supervise.toml` in the user's configuration
                directory is read if it is there. A file in the working directory is never read by itself.
            environ: the environment; default `os.environ`.
            overrides: dotted names to values, such as `{"index.startup_timeout": 5}`: what a command line said.

        Raises:
            SettingsError: an unknown name (with the nearest right one), a bad value, a file that is missing
                or does not parse.
            MissingExtra: the extra `cli` or `worker` is not installed.
        """
        from supervise.settings_sources import load

        return load(
            config=config, environ=os.environ if environ is None else environ, overrides=overrides or {}
        )
