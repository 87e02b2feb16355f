"""`supervise config`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from supervise.cli.common import in_trio, overrides
from supervise.cli.options import Config, OneObject, Set, switch


def config(
    name: Annotated[str | None, Parameter(help="A setting, or a table of them; default: all.")] = None,
    /,
    *,
    example: Annotated[bool, switch("--example", "A supervise.toml with all settings, each explained.")] = False,
    set: Set = None,
    config: Config = None,
    json: OneObject = False,
) -> int:
    """Show each setting, and where its value comes from: default, file, environment or command line.

    Example: supervise config index

    Example: mkdir -p ~/.config/supervise && supervise config --example > ~/.config/supervise/supervise.toml
    """
    from supervise.cli import config as command
    from supervise.errors import SettingsError

    if example:
        if name is not None or config is not None or set or json:
            raise SettingsError("--example writes all settings, as TOML; leave NAME, --set, --config and --json out")
        return in_trio(command.example)
    return in_trio(command.show, name, config, overrides(set), json)
