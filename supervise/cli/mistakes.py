"""What somebody typed wrong, in one line: what it is, what is allowed, and where to look."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Final

from cyclopts import App, CycloptsError, Token
from cyclopts.exceptions import CoercionError, MissingArgumentError, UnknownCommandError, UnusedCliTokensError

#: What a value has to be, by the type that was asked for.
_KINDS: Final = {int: "a whole number", float: "a number", bool: "true or false"}


def told(error: CycloptsError, app: App) -> str:
    """The line.

    Args:
        error: as cyclopts raised it.
        app: the whole command line.
    """
    command = " ".join((app.name[0], *(error.command_chain or ())))
    return f"{_what(error, command)} ({command} --help lists what there is)"


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
            near = difflib.get_close_matches(word, ["--help", "--version"], n=1)
            hint = f" Did you mean {near[0]}?" if near else " Options come after the command."
            return f"Unknown option: {word}.{hint}"
        case MissingArgumentError(argument=argument) if argument is not None and error.keyword is None:
            return f"{command} needs {argument.name.lstrip('-').upper()}: {_lower(argument.parameter.help or '')}"
    return " ".join(str(error).split())


def _lower(text: str) -> str:
    """The help of a word, within a sentence."""
    return text[:1].lower() + text[1:].rstrip(".")
