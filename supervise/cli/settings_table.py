"""All settings as a Markdown table, made of their definitions.

python -m supervise.cli.settings_table --write docs/settings.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from supervise.settings import Settings, home_of_user

__all__ = ["BEGIN", "END", "settings_table", "with_table"]

BEGIN = "<!-- settings: begin (made by python -m supervise.cli.settings_table --write docs/settings.md) -->"
END = "<!-- settings: end -->"


def settings_table() -> str:
    """The table: name, environment name, default, unit and help of each setting."""
    rows = [
        ("Name", "Environment", "Default", "Unit", "What it is"),
        *(
            (
                f"`{name}`",
                f"`SUPERVISE_{name.replace('.', '__').upper()}`",
                _default(field),
                field.metadata["unit"],
                _cell(field.metadata["help"]),
            )
            for name, field in _settings(Settings)
        ),
    ]
    lines = [" ".join(f"| {cell}" if cell else "|" for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]])


def with_table(text: str) -> str:
    """`text` with the table between its two markers.

    Raises:
        ValueError: the markers are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the markers are missing: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{settings_table()}\n\n{END}{after}"


def _settings(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and fields; those of no table first, as TOML wants them."""
    attrs.resolve_types(cls)
    parts = []
    for field in attrs.fields(cls):
        if isinstance(field.type, type) and attrs.has(field.type):
            parts.append(field)
        else:
            yield prefix + field.name, field
    for part in parts:
        yield from _settings(part.type, f"{part.name}.")


def _default(field: Any) -> str:
    default = field.default
    value = default.factory() if hasattr(default, "factory") else default
    match value:
        case None:
            return "unset"
        case Path():
            text = str(value).replace(str(home_of_user()), "~", 1)
        case float():
            text = f"{value:g}"
        case str():
            text = value
        case Mapping():
            text = json.dumps(dict(value))
        case Sequence():
            text = json.dumps(list(value))
        case _:
            text = json.dumps(value)
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _main(argv: Sequence[str]) -> int:
    if len(argv) == 2 and argv[0] == "--write":
        path = Path(argv[1])
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    if argv:
        print("use: python -m supervise.cli.settings_table [--write FILE]", file=sys.stderr)
        return 2
    print(settings_table())
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
