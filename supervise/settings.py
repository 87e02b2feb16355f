"""One tree of settings. Values only: `Settings()` reads nothing, `Settings.load()` file and environment.

Every bound in the library is here, with its unit. The names are those of the environment
(`SUPERVISE_INDEX__STARTUP_TIMEOUT=5`) and of the TOML file (`[index] startup_timeout = 5`).
"""

# ruff: noqa: RUF009  # `_setting` is attrs' `field`, not a default value that all instances would share

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from attrs import field, frozen

from supervise.errors import SettingsError
from supervise.rules import Validator, is_environment, rules
from supervise.secrets import Secret

__all__ = [
    "AgentSettings",
    "BreakerSettings",
    "HttpSettings",
    "IndexSettings",
    "LogSettings",
    "RedisSettings",
    "Settings",
    "WorkerSettings",
]

_r = rules(SettingsError)


def _setting(default: Any, help: str, *, unit: str = "", validator: Validator | None = None) -> Any:
    return field(default=default, validator=validator, metadata=_told(help, unit))


def _told(help: str, unit: str = "") -> dict[str, str]:
    """A field with a converter is made by `field` itself: only so does a type checker see what may be given."""
    return {"help": help, "unit": unit}


def _part(cls: type) -> Any:
    return field(factory=cls, validator=_r.instance(cls, f"of class {cls.__name__}"))


def _seconds(default: float, help: str, *, zero: bool = False) -> Any:
    rule = _r.not_negative("seconds") if zero else _r.positive("seconds")
    return _setting(default, help, unit="s", validator=rule)


def _switch(default: bool, help: str) -> Any:
    return _setting(default, help, validator=_r.instance(bool, "true or false"))


# The converters leave alone what they do not understand: the validator behind them can name the setting.


T = TypeVar("T")
AnyPath = str | os.PathLike[str]


def _tuple(value: Sequence[T]) -> tuple[T, ...]:
    known = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return tuple(value) if known else value  # type: ignore[return-value]  # left to the validator


def _words(value: str | Sequence[str]) -> tuple[str, ...]:
    """A command: a program, or a program and its first arguments."""
    return (value,) if isinstance(value, str) else _tuple(value)


def _names_of(value: Sequence[str]) -> tuple[str, ...]:
    return _tuple(value)


def _secret(value: str | Secret | None) -> Secret | None:
    return Secret(value) if isinstance(value, str) else value


def _path(value: AnyPath) -> Path:
    """Without the rule for the empty text it would be the working directory."""
    known = value != "" and isinstance(value, str | os.PathLike)
    return Path(value) if known else value  # type: ignore[return-value]  # left to the validator


def _maybe_path(value: AnyPath | None) -> Path | None:
    return None if value is None else _path(value)


def _paths(value: Sequence[AnyPath]) -> tuple[Path, ...]:
    items = _tuple(value)
    return tuple(_path(item) for item in items) if isinstance(items, tuple) else items


def _env(value: Mapping[str, str]) -> dict[str, str]:
    return dict(value) if isinstance(value, Mapping) else value


def _shown_env(value: Mapping[str, str]) -> str:
    """Names only: a value in an environment may be a secret."""
    return "{" + ", ".join(f"{name!r}: …" for name in value) + "}"


def _is_path(value: object) -> bool:
    return isinstance(value, Path) and "\0" not in str(value)


_command = _r.check(
    lambda v: isinstance(v, tuple) and bool(v) and all(isinstance(w, str) and w and "\0" not in w for w in v),
    "a program and its arguments",
)
_names = _r.check(
    lambda v: isinstance(v, tuple) and all(isinstance(n, str) and n and not {"=", "\0"} & {*n} for n in v),
    "a list of names",
)
_a_path = _r.check(_is_path, "a path")
_path_or_none = _r.check(lambda v: v is None or _is_path(v), "a path")
_all_paths = _r.check(lambda v: isinstance(v, tuple) and all(map(_is_path, v)), "a list of paths")
_secret_or_none = _r.check(
    lambda v: v is None or (isinstance(v, Secret) and "\0" not in v.reveal()), "a text without NUL", hide=True
)
_environment = _r.check(is_environment, "names and texts without NUL, names without '='", hide=True)


def home_of_user() -> Path:
    """The home of the user that runs this process, from the user database (not from the environment)."""
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:  # a user id without an entry, as containers have them
        return Path(tempfile.gettempdir()) / f"supervise-{os.getuid()}"


@frozen(kw_only=True)
class AgentSettings:
    """How the agent is run."""

    PATH: ClassVar[str] = "agent"

    command: tuple[str, ...] = field(
        default=("claude",),
        converter=_words,
        validator=_command,
        metadata=_told("program (and first arguments) of the agent's CLI"),
    )
    termination_timeout: float = _seconds(10.0, "between SIGTERM and SIGKILL to the agent's tree", zero=True)
    pass_env: tuple[str, ...] = field(
        default=(),
        converter=_names_of,
        validator=_names,
        metadata=_told("names of further environment variables that the agent gets"),
    )
    env: dict[str, str] = field(
        factory=dict,
        converter=_env,
        validator=_environment,
        repr=_shown_env,
        metadata=_told("further environment of the agent, name to value"),
    )
    exit_linger: float = _seconds(30.0, "silence after a good last result, after which the agent is stopped", zero=True)
    max_line: int = _setting(
        64 * 1024 * 1024,
        "longest line of the agent's output that is understood",
        unit="B",
        validator=_r.count(1024),
    )


@frozen(kw_only=True)
class IndexSettings:
    """The code index that lives beside the agent."""

    PATH: ClassVar[str] = "index"

    mode: Literal["auto", "cidx", "none"] = _setting(
        "auto",
        "cidx, none, or auto: cidx where the workspace holds .code-indexer/",
        validator=_r.one_of("auto", "cidx", "none"),
    )
    command: tuple[str, ...] = field(
        default=("cidx",),
        converter=_words,
        validator=_command,
        metadata=_told("program (and first arguments) of the indexer"),
    )
    watch_enabled: bool = _switch(True, "run `cidx watch` beside the agent")
    startup_timeout: float = _seconds(30.0, "how long the agent waits for the index at most", zero=True)
    assume_fresh: bool = _switch(False, "take a workspace that was never seen before for indexed")
    settle_time: float = _seconds(2.0, "a watch that has lived so long lets the agent start, untrusted", zero=True)
    flush_timeout: float = _seconds(5.0, "between SIGINT (flush) and SIGTERM to the watch", zero=True)
    termination_timeout: float = _seconds(10.0, "between SIGTERM and SIGKILL to the watch's tree", zero=True)
    fallback_to_reconcile: bool = _switch(True, "reconcile when the watch cannot be trusted")
    reconcile_timeout: float = _seconds(600.0, "longest `cidx index --reconcile`")
    reconcile_on_cancel: bool = _switch(False, "reconcile also after the job was cancelled")
    command_timeout: float = _seconds(30.0, "longest `cidx start`, `fix-config` and `stop`, each")
    voyage_api_key: Secret | None = field(
        default=None,
        converter=_secret,
        validator=_secret_or_none,
        metadata=_told("key of the embedding service; the index alone gets it"),
    )


@frozen(kw_only=True)
class WorkerSettings:
    """The worker that takes tasks from a directory."""

    PATH: ClassVar[str] = "worker"

    root: Path | None = field(
        default=None,
        converter=_maybe_path,
        validator=_path_or_none,
        metadata=_told("directory that holds tasks/, running/, results/ …"),
    )
    workspace: Path | None = field(
        default=None,
        converter=_maybe_path,
        validator=_path_or_none,
        metadata=_told("workspace of tasks that name none"),
    )
    workspaces: tuple[Path, ...] = field(
        default=(),
        converter=_paths,
        validator=_all_paths,
        metadata=_told("directories under which a task's workspace may lie"),
    )
    max_concurrent: int = _setting(3, "jobs at a time", validator=_r.count(1))
    max_attempts: int = _setting(3, "attempts at a task", validator=_r.count(1, 100))
    backoff_base: float = _seconds(1.0, "first pause before a retry")
    backoff_cap: float = _seconds(300.0, "longest pause before a retry")
    lock_file: Path | None = field(
        default=None,
        converter=_maybe_path,
        validator=_path_or_none,
        metadata=_told("lock file of the single instance"),
    )
    lock_timeout: float = _seconds(0.0, "how long a starting worker waits for its lock", zero=True)
    drain_timeout: float = _seconds(600.0, "how long a draining worker waits for its jobs", zero=True)
    task_timeout: float = _seconds(600.0, "longest run of a task that names no timeout")
    parse_grace: float = _seconds(2.0, "how long a file that does not parse is left to its writer", zero=True)
    sweep_interval: float = _seconds(60.0, "between two looks at the whole directory")
    poll_interval: float = _seconds(1.0, "likewise, where the kernel tells nothing of changes, and after trouble")
    quota_pause: float = _seconds(300.0, "pause at a used-up quota that does not say when it resets")
    longest_quota_pause: float = _seconds(8 * 86400.0, "longest such pause; a later reset is not believed")
    metrics_port: int | None = _setting(
        None,
        "port of http.host for Prometheus, 0 for any; unset: no metrics",
        validator=_r.check(lambda v: v is None or (type(v) is int and 0 <= v <= 65535), "a port from 0 to 65535"),
    )


@frozen(kw_only=True)
class BreakerSettings:
    """The circuit breaker."""

    PATH: ClassVar[str] = "breaker"

    failures: int = _setting(5, "consecutive failures that open the breaker", validator=_r.count(1))
    reset_after: float = _seconds(60.0, "how long an open breaker waits before its probe")


@frozen(kw_only=True)
class RedisSettings:
    """The Redis that carries requests past one machine."""

    PATH: ClassVar[str] = "redis"

    url: Secret | None = field(
        default=None,
        converter=_secret,
        validator=_secret_or_none,
        metadata=_told("address, such as redis://127.0.0.1:6379/0"),
    )


@frozen(kw_only=True)
class HttpSettings:
    """The HTTP pages."""

    PATH: ClassVar[str] = "http"

    host: str = _setting(
        "127.0.0.1",
        "address to listen on",
        validator=_r.check(lambda v: isinstance(v, str) and bool(v), "an address or a name"),
    )
    port: int = _setting(8787, "port to listen on, 0 for any", validator=_r.count(0, 65535))
    token: Secret | None = field(
        default=None,
        converter=_secret,
        validator=_secret_or_none,
        metadata=_told("bearer token that callers must show"),
    )


@frozen(kw_only=True)
class LogSettings:
    """What is told on standard error, and how."""

    PATH: ClassVar[str] = "log"

    format: Literal["console", "json"] = _setting(
        "console",
        "console: for people; json: one object a line",
        validator=_r.one_of("console", "json"),
    )
    level: Literal["debug", "info", "warning", "error"] = _setting(
        "info",
        "what is less important is left out: debug, info, warning or error",
        validator=_r.one_of("debug", "info", "warning", "error"),
    )


@frozen(kw_only=True)
class Settings:
    """All settings, with their defaults. Immutable; `attrs.evolve` makes a changed copy."""

    PATH: ClassVar[str] = ""

    state_dir: Path = field(
        factory=lambda: home_of_user() / ".local" / "state" / "supervise",
        converter=_path,
        validator=_a_path,
        metadata=_told("where stale marks, results, heartbeats and logs are kept"),
    )
    script_dirs: tuple[Path, ...] = field(
        default=(Path("scripts"),),
        converter=_paths,
        validator=_all_paths,
        metadata=_told("directories of the script catalogue; the default one lies in the working directory"),
    )
    executor: Literal["local", "mock", "redis", "http"] = _setting(
        "local",
        "who runs jobs: local, mock, redis or http",
        validator=_r.one_of("local", "mock", "redis", "http"),
    )
    containment: Literal["auto", "cgroup", "guardian", "process-group"] = _setting(
        "auto",
        "what holds a tree of processes together: guardian, cgroup (a guardian and a cgroup on top), process-group, "
        "or auto: the best that this machine gives",
        validator=_r.one_of("auto", "cgroup", "guardian", "process-group"),
    )
    guardian_timeout: float = _seconds(10.0, "how long a guardian may leave a request unanswered before it is killed")
    orphan_grace: float = _seconds(1.0, "between SIGTERM and SIGKILL for children whose supervisor died", zero=True)
    heartbeat_interval: float = _seconds(10.0, "between two heartbeats of a job")
    kill_wait: float = _seconds(5.0, "how long a tree is waited for after SIGKILL")
    pipe_timeout: float = _seconds(5.0, "how long output is read after the tree is empty", zero=True)
    log_max_bytes: int = _setting(
        100 * 1024 * 1024,
        "size of each output log; past it, head and tail are kept",
        unit="B",
        validator=_r.count(65536),
    )
    tail_bytes: int = _setting(64 * 1024, "size of the output tails in a result", unit="B", validator=_r.count(0))
    events_max_bytes: int = _setting(
        16 * 1024 * 1024,
        "size of the event log of a job; past it, what the agent says is left out",
        unit="B",
        validator=_r.count(65536),
    )
    jobs_max_age: float = _seconds(30 * 86400.0, "logs and results of jobs that ended longer ago are removed")
    jobs_max_bytes: int = _setting(
        10 * 1024 * 1024 * 1024,
        "size of the logs and results of all jobs; past it, those of the oldest that have ended are removed",
        unit="B",
        validator=_r.count(1024 * 1024),
    )
    log: LogSettings = _part(LogSettings)
    agent: AgentSettings = _part(AgentSettings)
    index: IndexSettings = _part(IndexSettings)
    worker: WorkerSettings = _part(WorkerSettings)
    breaker: BreakerSettings = _part(BreakerSettings)
    redis: RedisSettings = _part(RedisSettings)
    http: HttpSettings = _part(HttpSettings)

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
            overrides: dotted names to values, such as `{"index.startup_timeout": 5}`: what a command line
                said. Texts are understood as in the environment.

        Raises:
            SettingsError: an unknown name (with the nearest right one), a bad value, a file that is missing
                or does not parse.
            MissingExtra: the extra `cli` or `worker` is not installed.
        """
        from supervise.settings_sources import load

        return load(config=config, environ=os.environ if environ is None else environ, overrides=overrides or {})
