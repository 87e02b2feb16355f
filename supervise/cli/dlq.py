"""`supervise dlq`: the dead letters of a root."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from supervise.cli import exit_codes
from supervise.cli.stdout import put_out
from supervise.cli.tables import put_table, standard_output
from supervise.cli.tasks import root_of
from supervise.cli.view import say
from supervise.codec import to_line
from supervise.dispatch.dead_letters import DeadLetter, DeadLetters
from supervise.errors import SettingsError, SuperviseError
from supervise.settings import Settings

#: Of a terminal on which the table has all of its columns, in cells.
ROOMY = 72


async def list_all(settings: Settings, worker: str | None, json: bool, *, console: Console) -> int:
    """A table of the dead letters; with `json`, an object a line."""
    letters = DeadLetters(root_of(settings), worker).all()
    if json:
        return await put_out(b"".join(to_line(_told(letter)) for letter in letters))
    out = standard_output()
    table = Table(box=None, pad_edge=False, expand=out.is_terminal)
    columns = ["name", "worker", "reason", "since", "tries"]
    if out.width < ROOMY:
        del columns[3:]
    for column in columns:
        table.add_column(column, overflow="fold")
    table.add_column("detail", overflow="ellipsis", no_wrap=True, ratio=1)  # what is left of a terminal
    for letter in letters:
        record = letter.record
        attempts = record.get("attempts")
        cells = [
            letter.name,
            letter.worker,
            record.get("dlq_reason", "?"),
            str(record.get("dlq_timestamp", "?"))[:19],
            len(attempts) if isinstance(attempts, list) else 0,
        ]
        shown = [*cells[: len(columns)], record.get("dlq_detail", "")]
        table.add_row(*(Text(_printable(str(cell))) for cell in shown))  # as it is: rich takes brackets for markup
    if letters:
        code = await put_table(table)
        if code != exit_codes.COMPLETED:
            return code
    say(console, f"supervise: {len(letters)} dead letter{'' if len(letters) == 1 else 's'}", "dim")
    return exit_codes.COMPLETED


async def show(settings: Settings, names: list[str], worker: str | None, *, console: Console) -> int:
    """The whole records."""
    if not names:
        raise SettingsError("no dead letter was named; supervise dlq list tells which there are")
    for letter in DeadLetters(root_of(settings), worker).named(names):
        text = json_module.dumps(_told(letter), indent=2, ensure_ascii=True)
        code = await put_out(text.encode() + b"\n")
        if code != exit_codes.COMPLETED:
            return code
    return exit_codes.COMPLETED


async def retry(settings: Settings, names: list[str], worker: str | None, every: bool, *, console: Console) -> int:
    """Put dead letters back into tasks/."""
    letters = DeadLetters(root_of(settings), worker)

    def put_back(letter: DeadLetter) -> None:
        say(console, f"supervise: {letter.name} waits again: {letters.retry(letter)}")

    return _each(_chosen(letters, names, every), put_back, console)


async def drop(settings: Settings, names: list[str], worker: str | None, every: bool, *, console: Console) -> int:
    """Remove dead letters for good."""
    letters = DeadLetters(root_of(settings), worker)

    def remove(letter: DeadLetter) -> None:
        letters.drop(letter)
        say(console, f"supervise: {letter.name} is removed")

    return _each(_chosen(letters, names, every), remove, console)


def _each(letters: list[DeadLetter], do: Callable[[DeadLetter], None], console: Console) -> int:
    """One that cannot be seen to keeps no other from it."""
    code = exit_codes.COMPLETED
    for letter in letters:
        try:
            do(letter)
        except SuperviseError as error:
            say(console, f"supervise: {letter.name}: {error}", "red")
            code = exit_codes.FAILED
    return code


def _chosen(letters: DeadLetters, names: list[str], every: bool) -> list[DeadLetter]:
    if every == bool(names):
        raise SettingsError("name dead letters, or give --all; supervise dlq list tells which there are")
    return letters.all() if every else letters.named(names)


def _told(letter: DeadLetter) -> dict[str, Any]:
    """The record as a whole: a task may have any keys of its own."""
    raw = {} if letter.raw is None else {"raw": str(letter.raw)}
    told = {"name": letter.name, "worker": letter.worker, "file": str(letter.path), **raw}
    return {**told, "record": dict(letter.record)}


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
