"""All commands and options as Markdown, made of their definitions.

python -m supervise.cli.reference --write docs/cli.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from inspect import Parameter as Word
from typing import Any

from cyclopts import App

from supervise.cli.app import EPILOGUE, app
from supervise.cli.documents import main, with_part

__all__ = ["BEGIN", "END", "Command", "commands", "reference", "with_reference"]

BEGIN = "<!-- commands: begin (made by python -m supervise.cli.reference --write docs/cli.md) -->"
END = "<!-- commands: end -->"

Command = tuple[tuple[str, ...], App]
"""The words of a command, and what cyclopts knows of it."""


def commands(of: App = app, words: tuple[str, ...] = ("supervise",)) -> Iterator[Command]:
    """Every command that does something, in the order of the help."""
    for name in of:
        if name.startswith("-"):
            continue
        found = of[name]
        if found.default_command is not None:
            yield (*words, name), found
        yield from commands(found, (*words, name))


def reference() -> str:
    """The text: each command with its examples, words and options."""
    return "\n\n".join([*(_told(words, command) for words, command in commands()), EPILOGUE])


def with_reference(text: str) -> str:
    """`text` with the reference between its two markers.

    Raises:
        ValueError: the markers are not there.
    """
    return with_part(text, BEGIN, END, reference())


def _told(words: tuple[str, ...], command: App) -> str:
    parts = command.help.split("\n\n")
    examples = [part.removeprefix("Example: ") for part in parts if part.startswith("Example: ")]
    prose = [_cell(part) for part in parts if not part.startswith("Example: ")]
    rows = [_row(argument) for argument in command.assemble_argument_collection()]
    table = ["| | | Default |", "| --- | --- | --- |", *(" ".join(f"| {cell}" for cell in row) + " |" for row in rows)]
    shown = ["```sh", *examples, "```"]
    return "\n\n".join([f"## {' '.join(words)}", *prose, "\n".join(shown), "\n".join(table)])


def _row(argument: Any) -> tuple[str, str, str]:
    name, kind = argument.names[0], _kind(argument)
    if name.startswith("-"):
        left = f"`{name} {kind}`" if kind else f"`{name}`"
    else:
        left = f"`{name}`" if argument.required else f"`[{name}]`"
    default = argument.field_info.default
    told = argument.parameter.show_default is not False and default not in (None, False, Word.empty)
    return left, _cell(argument.parameter.help or ""), f"`{default}`" if told else "–"


def _kind(argument: Any) -> str:
    """What the value of an option looks like."""
    choices = argument.get_choices()
    if choices:
        return "\\|".join(choices)
    return "" if argument.hint is bool else argument.parameter.metavar


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "supervise.cli.reference", reference, with_reference))
