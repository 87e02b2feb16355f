"""The tables of lifecycle.py as Markdown, for docs/lifecycle.md.

python -m supervise.index.diagram                             prints the state diagram
python -m supervise.index.diagram --write docs/lifecycle.md   brings the document up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from supervise.index.lifecycle import ENDS, FINAL, LIVE_STATUS, TABLE, State


def mermaid() -> str:
    """`TABLE` as a Mermaid state diagram: an arrow for each pair of states, with all events that lead over it."""
    arrows: dict[str, list[str]] = {}
    for (source, event), target in TABLE.items():
        arrows.setdefault(f"{source.value} --> {target.value}", []).append(event.value)
    lines = ["stateDiagram-v2", f"    [*] --> {State.NOT_STARTED.value}"]
    lines += [f"    {arrow}: {', '.join(events)}" for arrow, events in arrows.items()]
    lines += [f"    {state.value} --> [*]" for state in State if state in FINAL]
    return "\n".join(lines) + "\n"


def transitions() -> str:
    """`TABLE` as a Markdown table: a row for each state, and what is told of the index meanwhile."""
    lines = ["| state | events, and where they lead | `index.status` meanwhile |", "|---|---|---|"]
    for state in State:
        leads = [f"{event.value} → `{target.value}`" for (source, event), target in TABLE.items() if source is state]
        status = LIVE_STATUS[state]
        told = "as before" if status is None else f"`{status.value}`"
        lines.append(f"| `{state.value}` | {'; '.join(leads)} | {told} |")
    return "\n".join(lines) + "\n"


def endings() -> str:
    """`ENDS` as a Markdown table."""
    lines = ["| | ending | reconcile at the end | `index.status` |", "|---|---|---|---|"]
    for number, end in enumerate(ENDS, 1):
        status = f"`{end.status.value}`"
        if end.reconcile:
            status += ", or `failed` if the reconcile cannot be believed"
        lines.append(f"| {number} | {end.name} | {'yes' if end.reconcile else 'no'} | {status} |")
    return "\n".join(lines) + "\n"


def updated(document: str) -> str:
    """`document` with what stands between its markers made anew.

    Raises:
        ValueError: a pair of markers is missing.
    """
    blocks = {"diagram": f"```mermaid\n{mermaid()}```\n", "transitions": transitions(), "endings": endings()}
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: generated -->\n", f"<!-- {name}: end -->"
        before, found, rest = document.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the document lacks the markers {begin.strip()!r} and {end!r}")
        document = f"{before}{begin}\n{block}\n{end}{after}"
    return document


def main(arguments: list[str]) -> int:
    """Print the diagram, or write the document."""
    match arguments:
        case []:
            sys.stdout.write(mermaid())
        case ["--write", name]:
            path = Path(name)
            path.write_text(updated(path.read_text("utf-8")), "utf-8")
        case _:
            sys.stderr.write("usage: python -m supervise.index.diagram [--write docs/lifecycle.md]\n")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
