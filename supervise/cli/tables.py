"""What is drawn for people on standard output: as wide as the terminal, or as wide as it likes where there is none."""

from __future__ import annotations

import sys

from rich.console import Console, RenderableType

from supervise.cli.stdout import put_out
from supervise.cli.streams import SPELL, on_terminal

#: Of what no terminal bounds, in characters: whoever reads it there cuts it by himself.
WIDE = 400


def standard_output(*, wide: int = WIDE) -> Console:
    """A console that draws for standard output; what it draws is to be captured and put out by `put_out`."""
    return Console() if on_terminal(sys.stdout) else Console(width=wide)


async def put_table(*drawn: RenderableType, wide: int = WIDE) -> int:
    """Draw on standard output; the exit code, which tells of a reader who has gone away."""
    console = standard_output(wide=wide)
    with console.capture() as captured:
        console.print(*drawn, sep="\n")
    # Without the blanks to the right, which only a picture on a terminal needs.
    text = "".join(f"{line.rstrip(' ')}\n" for line in captured.get().splitlines())
    return await put_out(text.encode(console.encoding, SPELL))
