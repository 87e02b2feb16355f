"""`supervise completion`."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(help="Your shell.")],
    /,
) -> int:
    """Print a script that lets your shell complete commands and options.

    Example: supervise completion bash >> ~/.bash_completion

    Example: supervise completion zsh > ~/.zfunc/_supervise  # a directory of your $fpath

    Example: supervise completion fish > ~/.config/fish/completions/supervise.fish
    """
    from supervise.cli.app import app

    print(app.generate_completion(shell=shell))
    return 0
