"""`supervise config`: each setting, and where its value comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from supervise.cli.settings_table import definitions, example_file, plain
from supervise.cli.stdout import put_out
from supervise.cli.tables import put_table, standard_output
from supervise.cli.view import say
from supervise.codec import to_line
from supervise.errors import SettingsError
from supervise.secrets import MASK, Masker, Secret, secret_values
from supervise.settings import Settings
from supervise.settings_sources import DEFAULT, load_with_origins, nearest, settings_file

#: Terminals narrower than this get each value below its name.
NARROW = 76


async def show(
    name: str | None, config: Path | None, overrides: Mapping[str, Any], json: bool, *, console: Console
) -> int:
    """Print the settings, and return the exit code. No secret is shown, and no value of `agent.env`.

    Args:
        name: a setting, or a table of them; `None` for all.
        config: the file that was named.
        overrides: what the command line says, by dotted names.
        json: one JSON object.
        console: where people look: it is told which file is read.

    Raises:
        SettingsError, MissingExtra: as `Settings.load`, and for a name that is none.
    """
    settings, origins = load_with_origins(config=config, environ=os.environ, overrides=overrides)
    path = settings_file(config, os.environ)
    exists = path.exists()
    units = {setting: field.metadata["unit"] for setting, field in definitions()}
    chosen = _chosen(name, [*units])
    masker = Masker(secret_values(os.environ) | _secrets_in(settings))
    values = {setting: _masked(attrgetter(setting)(settings), masker) for setting in chosen}
    if json:
        told = {
            setting: {"value": value, "origin": origins[setting], "unit": units[setting]}
            for setting, value in values.items()
        }
        return await put_out(
            to_line({"type": "config", "file": {"path": str(path), "exists": exists}, "settings": told})
        )
    rows = [
        (setting, " ".join((plain(value), units[setting])).rstrip() if value is not None else "unset", origins[setting])
        for setting, value in values.items()
    ]
    out = standard_output()
    code = await put_table(_narrow(rows) if out.is_terminal and out.width < NARROW else _table(rows))
    if code == 0:
        way = "is read" if exists else "would be read, but does not exist (supervise config --example prints one)"
        say(console, f"supervise: {plain(path)} {way}", "dim")
    return code


async def example(*, console: Console) -> int:
    """Print a supervise.toml with all settings in comments, and return the exit code.

    Args:
        console: not used: the file goes to standard output.
    """
    return await put_out(example_file().encode())


def _chosen(name: str | None, names: list[str]) -> list[str]:
    if name is None:
        return names
    wanted = name.rstrip(".")
    chosen = [each for each in names if each == wanted or each.startswith(f"{wanted}.")]
    if chosen:
        return chosen
    tables = {each.partition(".")[0] for each in names if "." in each}
    near = nearest(name, [*names, *sorted(tables)])
    hint = f"did you mean {near}?" if near else "supervise config lists the settings"
    raise SettingsError(f"{name!r} is no setting and no table of settings; {hint}")


def _secrets_in(settings: Settings) -> set[str]:
    values = (attrgetter(name)(settings) for name, _ in definitions())
    return {value.reveal() for value in values if isinstance(value, Secret)} | secret_values(settings.agent.env)


def _masked(value: Any, masker: Masker) -> Any:
    """A value that may be shown, of JSON's types."""
    match value:
        case Secret():
            return MASK
        case str() | Path():
            return masker.text(str(value))
        case Mapping():
            return dict.fromkeys(map(masker.text, value), MASK)
        case tuple():
            return [_masked(item, masker) for item in value]
    return value


def _style(origin: str) -> str:
    """What somebody has changed stands out."""
    return "" if origin == DEFAULT else "bold"


def _table(rows: list[tuple[str, str, str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", overflow="fold")
    for name, value, origin in rows:
        style = _style(origin)
        table.add_row(Text(name, style), Text(value, style), Text(plain(origin), style or "dim"))
    return table


def _narrow(rows: list[tuple[str, str, str]]) -> Text:
    text = Text(overflow="fold")
    for name, value, origin in rows:
        text.append(f"{name}\n", _style(origin))
        text.append(f"  {value}\n  {plain(origin)}\n" if origin != DEFAULT else f"  {value}\n", _style(origin))
    text.right_crop(1)
    return text
