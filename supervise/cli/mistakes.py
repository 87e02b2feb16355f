"""What somebody typed wrong, in one line: what it is, what is allowed, and where to look."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from cyclopts import App, CycloptsError, Token
from cyclopts.exceptions import (
    CoercionError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

#: What a value has to be, by the type that was asked for.
_KINDS: Final = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "the path of a file or a directory (write . for the working directory)",
}

#: What cyclopts gets for the word "-", which it would take for an option: nobody types it.
DASH: Final = "\ue000-\ue000"

#: Fields of specs whose option has another name.
_OPTIONS: Final = {
    "JobSpec.prompt": "PROMPT",
    "Limits.memory_bytes": "--max-memory",
    "Limits.processes": "--max-processes",
    "ClaudeAgent.extra_args": "--agent-arg",
    "ScriptAgent.args": "ARGS",
}


def told(error: CycloptsError, app: App) -> str:
    """The line.

    Args:
        error: as cyclopts raised it.
        app: the whole command line.
    """
    command = " ".join((app.name[0], *(error.command_chain or ())))
    return f"{_what(error, command)} ({command} --help lists what there is)".replace(DASH, "-")


def of_spec(message: str) -> str:
    """What a value of a spec is said to be, with the option in place of the field."""

    def option(match: re.Match[str]) -> str:
        return _OPTIONS.get(match[0], f"--{match[1].replace('_', '-')}")

    return re.sub(r"\b(?:JobSpec|ClaudeAgent|Limits|ScriptAgent)\.(\w+)", option, message, count=1)


def path(kind: Any, tokens: Sequence[Token]) -> Path:
    """A converter: an empty word, as of a variable that is not set, is not the working directory. `~` is one's home."""
    text = tokens[0].value
    if not text:
        raise CoercionError(token=tokens[0], target_type=Path)
    return Path(text).expanduser() if re.match(r"~(/|$)", text) else Path(text)


def paths(kind: Any, tokens: Sequence[Token]) -> list[Path]:
    """Likewise, for an option that may be given again."""
    return [path(kind, [token]) for token in tokens]


def whole_number(kind: Any, tokens: Sequence[Token]) -> int:
    """A converter: cyclopts alone takes 2.5 for 2."""
    text = tokens[0].value
    try:
        return int(text)
    except ValueError:
        problem = CoercionError(token=tokens[0], target_type=int)
    raise problem


def _what(error: CycloptsError, command: str) -> str:
    match error:
        case CoercionError(msg=None, token=Token() as token, target_type=kind) if kind in _KINDS:
            name = token.keyword or (error.argument.name.upper() if error.argument else "the value")
            return f"{name} is {token.value!r}, but must be {_KINDS[kind]}"
        case UnusedCliTokensError(unused_tokens=[first, *_]):
            return f"{first!r} is one word too many for {command}; put quotes around words that belong together"
        case UnknownCommandError() if error.unused_tokens and error.unused_tokens[0].startswith("-"):
            word = error.unused_tokens[0]
            near = difflib.get_close_matches(word, ["--help", "--version"], n=1, cutoff=0.7)
            hint = f" Did you mean {near[0]}?" if near else " Options come after the command."
            return f"Unknown option: {word}.{hint}"
        case UnknownCommandError() if error.unused_tokens:
            word, known = error.unused_tokens[0], _commands(error)
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "There are:"
            return f"Unknown command {word!r}. {hint}" + ("" if near else f" {', '.join(known)}.")
        case UnknownOptionError() if command.endswith(" scripts run"):
            return f"{_plain(error)} An option of the script's own comes behind --"
        case MissingArgumentError(argument=argument) if argument is not None and error.keyword is None:
            return f"{command} needs {argument.name.lstrip('-').upper()}: {_lower(argument.parameter.help or '')}"
    return _plain(error)


def _plain(error: CycloptsError) -> str:
    return " ".join(str(error).split())


def _commands(error: CycloptsError) -> list[str]:
    return [name for name in error.app or () if not name.startswith("-")]


def _lower(text: str) -> str:
    """The help of a word, within a sentence."""
    return text[:1].lower() + text[1:].rstrip(".")
