"""`supervise dlq`: the dead letters of a root."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from supervise.cli import exit_codes
from supervise.cli.stdout import put_out
from supervise.cli.tables import WIDE, put_table, standard_output
from supervise.cli.tasks import root_of
from supervise.cli.view import say
from supervise.codec import to_line
from supervise.dispatch.dead_letters import DeadLetter, DeadLetters
from supervise.errors import SettingsError, SuperviseError
from supervise.settings import Settings

HEADS = ("name", "worker", "reason", "since", "tries")
GAP = 1
#: The detail is a column where it has so many cells; else it is below.
DETAIL = 24


async def list_all(settings: Settings, worker: str | None, json: bool, *, console: Console) -> int:
    """A table of the dead letters; with `json`, an object a line."""
    letters = DeadLetters(root_of(settings), worker).all()
    if json:
        return await put_out(b"".join(to_line(_told(letter)) for letter in letters))
    if letters:
        wide = WIDE + max(len(str(letter.record.get("dlq_detail", ""))) for letter in letters)
        code = await put_table(_drawn(letters, standard_output(wide=wide).width), wide=wide)
        if code != exit_codes.COMPLETED:
            return code
    say(console, f"supervise: {len(letters)} dead letter{'' if len(letters) == 1 else 's'}", "dim")
    return exit_codes.COMPLETED


def _drawn(letters: list[DeadLetter], width: int) -> RenderableType:
    """The table. What has no room is left out: names stay whole, since people have to type them."""
    rows = [[_printable(str(cell)) for cell in _cells(letter)] for letter in letters]
    details = [_printable(str(letter.record.get("dlq_detail", ""))) for letter in letters]
    needed = [max(map(cell_len, column)) + GAP for column in zip(HEADS, *rows, strict=True)]
    for count in (len(HEADS), 3):
        if sum(needed[:count]) + DETAIL <= width:
            table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), expand=True)
            for head, width_of_it in zip(HEADS[:count], needed, strict=False):
                table.add_column(head, no_wrap=True, min_width=width_of_it - GAP)
            table.add_column("detail", overflow="ellipsis", no_wrap=True, ratio=1)
            for row, detail in zip(rows, details, strict=True):
                table.add_row(*map(Text, row[:count]), Text(detail))  # as it is: rich takes brackets for markup
            return table
    below = Text(overflow="fold")
    for row, detail in zip(rows, details, strict=True):
        below.append(f"{row[0]}\n", "bold")
        below.append(f"  {row[1]}: {row[2]}\n  {detail}\n" if detail else f"  {row[1]}: {row[2]}\n")
    below.right_crop(1)
    return below


def _cells(letter: DeadLetter) -> tuple[object, ...]:
    attempts = letter.record.get("attempts")
    return (
        letter.name,
        letter.worker,
        letter.record.get("dlq_reason", "?"),
        str(letter.record.get("dlq_timestamp", "?"))[:19],
        len(attempts) if isinstance(attempts, list) else 0,
    )


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
