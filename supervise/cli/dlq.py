"""`supervise dlq`: the dead letters of a root."""

from __future__ import annotations

import json as json_module
from typing import Any

from rich.console import Console
from rich.table import Table

from supervise.cli import exit_codes
from supervise.cli.stdout import Stdout
from supervise.cli.tasks import root_of
from supervise.cli.view import say
from supervise.codec import to_line
from supervise.dispatch.dead_letters import DeadLetter, DeadLetters
from supervise.errors import SuperviseError
from supervise.settings import Settings

#: Of a table that no terminal bounds, in characters.
WIDE = 400


async def list_all(settings: Settings, worker: str | None, json: bool, *, console: Console) -> int:
    """A table of the dead letters; with `json`, an object a line."""
    letters = DeadLetters(root_of(settings), worker).all()
    if json:
        await Stdout(1, lambda: None).text(b"".join(to_line(_told(letter)) for letter in letters))
        return exit_codes.COMPLETED
    table = Table(box=None, pad_edge=False)
    for column in ("name", "worker", "reason", "since", "tries"):
        table.add_column(column, overflow="fold")
    table.add_column("detail", overflow="ellipsis", no_wrap=True)
    for letter in letters:
        record = letter.record
        attempts = record.get("attempts")
        table.add_row(
            letter.name,
            letter.worker,
            str(record.get("dlq_reason", "?")),
            str(record.get("dlq_timestamp", "?"))[:19],
            str(len(attempts) if isinstance(attempts, list) else 0),
            _printable(str(record.get("dlq_detail", ""))),
        )
    if letters:
        out = Console()
        if not out.is_terminal:  # whoever reads it there cuts it by himself
            out = Console(width=WIDE)
        out.print(table)
    say(console, f"supervise: {len(letters)} dead letter{'' if len(letters) == 1 else 's'}", "dim")
    return exit_codes.COMPLETED


async def show(settings: Settings, names: list[str], worker: str | None, *, console: Console) -> int:
    """The whole records."""
    for letter in DeadLetters(root_of(settings), worker).named(names):
        text = json_module.dumps(_told(letter), indent=2, ensure_ascii=True)
        await Stdout(1, lambda: None).text(text.encode() + b"\n")
    return exit_codes.COMPLETED


async def retry(settings: Settings, names: list[str], worker: str | None, every: bool, *, console: Console) -> int:
    """Put dead letters back into tasks/."""
    letters = DeadLetters(root_of(settings), worker)
    for letter in _chosen(letters, names, every):
        path = letters.retry(letter)
        say(console, f"supervise: {letter.name} waits again: {path}")
    return exit_codes.COMPLETED


async def drop(settings: Settings, names: list[str], worker: str | None, every: bool, *, console: Console) -> int:
    """Remove dead letters for good."""
    letters = DeadLetters(root_of(settings), worker)
    for letter in _chosen(letters, names, every):
        letters.drop(letter)
        say(console, f"supervise: {letter.name} is removed")
    return exit_codes.COMPLETED


def _chosen(letters: DeadLetters, names: list[str], every: bool) -> list[DeadLetter]:
    if every == bool(names):
        raise SuperviseError("name dead letters, or give --all; supervise dlq list tells which there are")
    return letters.all() if every else letters.named(names)


def _told(letter: DeadLetter) -> dict[str, Any]:
    raw = {} if letter.raw is None else {"raw": str(letter.raw)}
    return {**letter.record, "name": letter.name, "worker": letter.worker, "record": str(letter.path), **raw}


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
