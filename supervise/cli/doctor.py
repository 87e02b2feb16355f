"""`supervise doctor`: what this machine gives, what is missing, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import asdict, evolve
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from supervise.cli import exit_codes
from supervise.cli.checks import Check, examine, masker_of
from supervise.cli.signals import Signals
from supervise.cli.stdout import put_out
from supervise.cli.tables import put_table, standard_output
from supervise.codec import to_json, to_line
from supervise.secrets import Masker
from supervise.settings import Settings

#: Terminals narrower than this get each text below its name.
NARROW = 64
STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


async def run(settings: Settings, clean: bool, json: bool, *, console: Console) -> int:
    """Check, print, and return the exit code: 1 if there is an error.

    Args:
        settings: whose directories, programs, containment and Redis are looked at.
        clean: end what killed supervisors have left, too.
        json: one JSON object on standard output.
        console: not used: what the doctor says goes to standard output.
    """
    signals = Signals()
    with signals.watch(), signals.preparation:
        findings = await examine(settings, clean)
    if signals.ended_by is not None:
        return exit_codes.of_signal(signals.ended_by)
    masker = masker_of(settings)
    checks = [_shown(check, masker) for check in findings.checks]
    if json:
        told = {
            "type": "doctor",
            "containment": findings.tier,
            "checks": [asdict(check) for check in checks],
            "sweep": None if findings.report is None else to_json(findings.report),
        }
        code = await put_out(to_line(told))
    else:
        out = standard_output()
        narrow = out.is_terminal and out.width < NARROW
        code = await put_table(*_below(checks)) if narrow else await put_table(_table(checks))
    if code != exit_codes.COMPLETED:
        return code
    return exit_codes.FAILED if any(check.level == "error" for check in checks) else exit_codes.COMPLETED


def _shown(check: Check, masker: Masker) -> Check:
    """Programs say what they like: neither secrets nor what steers a terminal."""
    return evolve(check, text=_line(masker.text(check.text)), mend=_line(masker.text(check.mend)))


def _line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _table(checks: list[Check]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(Text(check.level, STYLES[check.level]), check.name, _text(check))
    return table


def _below(checks: list[Check]) -> Iterator[RenderableType]:
    for check in checks:
        yield Text.assemble((check.level, STYLES[check.level]), " ", (check.name, "bold"))
        yield Padding(_text(check), (0, 0, 0, 2))


def _text(check: Check) -> Text:
    text = Text(check.text, overflow="fold")
    if check.mend:
        text.append(f"\n→ {check.mend}", "dim")
    return text
