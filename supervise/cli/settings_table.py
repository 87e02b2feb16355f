"""All settings, told of by their definitions: as a Markdown table, and as a TOML file to begin with.

python -m supervise.cli.settings_table --write docs/settings.md
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from supervise.cli.documents import main, with_part
from supervise.secrets import Secret
from supervise.settings import Settings, home_of_user

__all__ = ["BEGIN", "END", "definitions", "example_file", "plain", "settings_table", "toml_value", "with_table"]

BEGIN = "<!-- settings: begin (made by python -m supervise.cli.settings_table --write docs/settings.md) -->"
END = "<!-- settings: end -->"

#: Of the example's comments, in characters.
WIDTH = 100
HEAD = """\
# Settings of supervise. Read from $XDG_CONFIG_HOME/supervise/supervise.toml (by default
# ~/.config/supervise/supervise.toml), or from the file that --config names.
#
# Each line that begins with "#" and a name holds a default: take the "#" away and change the value.
# "" unsets a setting that may be unset. Paths may begin with "~"; a relative one is relative to this file.
# Where XDG_STATE_HOME is set, state_dir is by default $XDG_STATE_HOME/supervise.
"""
UNITS = {"s": "seconds", "B": "bytes"}


def settings_table() -> str:
    """The table: name, environment name, default, unit and help of each setting."""
    rows = [
        ("Name", "Environment", "Default", "Unit", "What it is"),
        *(
            (
                f"`{name}`",
                f"`SUPERVISE_{name.replace('.', '__').upper()}`",
                _default_cell(field),
                field.metadata["unit"],
                _cell(field.metadata["help"]),
            )
            for name, field in definitions()
        ),
    ]
    lines = [" ".join(f"| {cell}" if cell else "|" for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]])


def with_table(text: str) -> str:
    """`text` with the table between its two markers.

    Raises:
        ValueError: the markers are not there.
    """
    return with_part(text, BEGIN, END, settings_table())


def example_file() -> str:
    """A TOML file that sets nothing: every setting with its help, its unit and its default, as comments.

    A line of a value begins with `#` and no blank. All of them taken in, the file holds the defaults.
    """
    lines = [HEAD]
    table = ""
    for name, field in definitions():
        prefix, _, key = name.rpartition(".")
        if prefix != table:
            table = prefix
            lines.append(f"[{table}]\n")
        unit = UNITS.get(field.metadata["unit"], field.metadata["unit"])
        told = field.metadata["help"] + (f"; {unit}" if unit else "")
        default = _default(field)
        value = f"{key} = {toml_value(_with_tilde(default))}"
        comments = [told, f"Default: {value}; here, relative to this file."] if _is_relative(default) else [told]
        lines += [
            "\n".join(textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ")) for text in comments
        ]
        if _is_relative(default):  # a file cannot say it
            lines.append("")
        else:
            lines.append(f"#{value}\n")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """A value as TOML has it. `None` and secrets are the empty text, which unsets them."""
    match value:
        case None | Secret():
            return '""'
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str() | Path():
            # Its escapes are TOML's, too, as long as it leaves alone what is not ASCII. But TOML escapes DEL.
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
        case Mapping():
            items = [f"{toml_value(str(name))} = {toml_value(item)}" for name, item in value.items()]
            return f"{{ {', '.join(items)} }}" if items else "{}"
        case Sequence():
            return f"[{', '.join(map(toml_value, value))}]"
    raise TypeError(f"TOML has no {type(value).__name__}")


def plain(value: Any) -> str:
    """A value as one writes it after `--set`. What is no number, path or plain text is JSON; no secret is shown."""
    match value:
        case None:
            return "unset"
        case Secret():
            return str(value)
        case bool():
            return str(value).lower()
        case float():
            return repr(int(value)) if value.is_integer() else repr(value)
        case int():
            return repr(value)
        case str() | Path():
            text = str(value)
            return text if text.isprintable() else json.dumps(text)
        case Mapping():
            return json.dumps(dict(value))
        case Sequence():
            return json.dumps([str(item) for item in value])
    raise TypeError(f"no setting is a {type(value).__name__}")


def definitions(cls: type = Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and fields; those of no table first, as TOML wants them."""
    attrs.resolve_types(cls)
    parts = []
    for field in attrs.fields(cls):
        if isinstance(field.type, type) and attrs.has(field.type):
            parts.append(field)
        else:
            yield prefix + field.name, field
    for part in parts:
        yield from definitions(part.type, f"{part.name}.")


def _default(field: Any) -> Any:
    default = field.default
    return default.factory() if hasattr(default, "factory") else default


def _default_cell(field: Any) -> str:
    value = _default(field)
    return "unset" if value is None else f"`{_cell(plain(_with_tilde(value)))}`"


def _with_tilde(value: Any) -> Any:
    """Paths without the name of whoever runs this."""
    home = str(home_of_user())
    if isinstance(value, Path) and (str(value) + os.sep).startswith(home.rstrip(os.sep) + os.sep):
        return "~" + str(value)[len(home.rstrip(os.sep)) :]
    return value


def _is_relative(value: Any) -> bool:
    paths = value if isinstance(value, tuple) else (value,)
    return any(isinstance(path, Path) and not path.is_absolute() for path in paths)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "supervise.cli.settings_table", settings_table, with_table))
