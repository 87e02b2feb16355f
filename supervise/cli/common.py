"""What commands share: settings out of options, and the way into Trio. What is heavy is loaded by those who run."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from pathlib import Path

    from supervise.settings import LogSettings, Settings

#: Values that no sink of ours may show.
secrets: set[str] = set()
#: How the settings want it told, as soon as they are known.
told_as: list[LogSettings] = []


def settings_of(config: Path | None, pairs: list[str] | None, options: dict[str, Any] | None = None) -> Settings:
    """The settings. What the options say goes over what `--set` says.

    Args:
        config: the file that was named.
        pairs: of `--set`.
        options: names of settings to what their options were given; `None` for those that were not.

    Raises:
        SettingsError, MissingExtra: as `Settings.load`.
    """
    from supervise.settings import Settings

    given = {name: str(value) for name, value in (options or {}).items() if value is not None}
    settings = Settings.load(config=config, overrides={**overrides(pairs), **given})
    secrets.update(_secrets_of(settings))
    told_as[:] = [settings.log]
    return settings


def absolute(path: Path) -> str:
    """The path from the root on. Raises SettingsError where it cannot be told."""
    import os

    from supervise.errors import SettingsError

    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        problem = f"{str(path)!r} is relative, but the working directory is gone; write the whole path"
    raise SettingsError(problem)


def overrides(pairs: list[str] | None) -> dict[str, str]:
    """What `--set` says. Raises SettingsError."""
    return dict(name_value_pairs(pairs, "--set"))


def name_value_pairs(pairs: list[str] | None, option: str) -> Iterator[tuple[str, str]]:
    """The words of an option that takes name=value. Raises SettingsError."""
    from supervise.errors import SettingsError

    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            example = "index.mode=none" if option == "--set" else "ticket=1234"
            raise SettingsError(f"{option} {pair!r} is no name=value; write {option} {example}, for instance")
        yield name, value


def whole(text: str | None) -> int | str | None:
    """A number where it is one; else the word, for whoever knows what words there are."""
    return int(text) if text is not None and re.fullmatch(r"[-+]?[0-9]{1,9}", text) else text


def seconds(text: str | None) -> float | str | None:
    """Likewise, of a moment."""
    return float(text) if text is not None and re.fullmatch(r"[-+]?[0-9]{1,15}(\.[0-9]*)?", text) else text


def in_trio(function: Any, *args: Any, settings: Settings | None = None, brief: bool = False) -> int:
    """Run the doing of a command, and return its exit code.

    Args:
        function: async; it gets `args`, and `console`, on which people look (standard error).
        args: its own.
        settings: how to tell (`log.format`, `log.level`); for people if absent.
        brief: it ends as soon as it can, so that garbage is not worth a look.
    """
    import trio

    from supervise.cli.hardening import hide_environment
    from supervise.cli.streams import Screen
    from supervise.cli.told import console_for
    from supervise.secrets import Masker

    if not brief:  # see __main__
        gc.freeze()
        gc.enable()
    hide_environment()
    screen = Screen(sys.stderr)
    with console_for(cast("TextIO", screen), settings, Masker(secrets)) as console:
        try:
            code: int = trio.run(lambda: function(*args, console=console))
        finally:
            screen.drain()
    return code


def _secrets_of(settings: Settings) -> set[str]:
    """What a file or the command line told us, and the environment need not hold."""
    from supervise.secrets import secret_values

    known = (settings.index.voyage_api_key, settings.redis.url, settings.http.token)
    return {secret.reveal() for secret in known if secret} | secret_values(settings.agent.env)
