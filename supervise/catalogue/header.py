"""The header of a script: the comments at its top that say what it is. Pure: text in, values out.

    #!/bin/sh
    # name: deploy
    # description: Bring the build to the servers,
    #   one after the other.
    # inputs: the build's number, as the first argument
    # tags: release, servers
    # task_class: MEDIUM_SCRIPT

Nothing in a header is an error: what cannot be understood is told as a problem, with its line.
"""

from __future__ import annotations

import difflib
import math
import re
from functools import lru_cache
from typing import Final

from attrs import frozen

__all__ = ["KEYS", "TASK_CLASSES", "Header", "parse", "render"]

KEYS: Final = ("name", "description", "inputs", "outputs", "tags", "timeout", "task_class")

#: How long a script of each class may run, in seconds, where its header names no timeout.
TASK_CLASSES: Final = {"FAST_SCRIPT": 120.0, "MEDIUM_SCRIPT": 600.0, "LLM_LITE": 480.0, "LLM_HEAVY": 1200.0}

#: Longer names are refused: they have to be typed.
MAX_NAME: Final = 100

#: Of somebody's value in a problem, in characters.
_CLIP = 60

#: A line of comment: its word before a colon, if there is one, and the rest. Or an empty line. No line of code.
_LINE = re.compile(r"[^\S\n]*+(?:(?:\#++|/{2,}+)[^\S\n]*+(?:([^:\n]*+):)?([^\n]*+))?(?:\n|\Z)")

#: A line that is drawn between others, and says nothing.
_RULE = re.compile(r"[-=*#_~+]{3,}+\s*+")

_KEYS = frozenset(KEYS)

#: Longer timeouts are none, and longer task classes like no other: what is done with them costs little, then.
_MOST_LETTERS = 64

#: Nothing is tried twice (`++`): a header is somebody else's, and one thread reads those of all.
_TIMEOUT = re.compile(r"((?:[0-9]++(?:\.[0-9]++)?+|\.[0-9]++)(?:e[+-]?[0-9]++)?+) ?([a-z]*+)")
_UNITS = {
    **dict.fromkeys(("", "s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3600),
}
_TIMEOUT_RULE = "seconds above 0, as 90, 90s, 2m or 1h"
_NAME_RULE = f"at most {MAX_NAME} printable characters, the first no '-'"


def _one_line(text: str) -> str:
    if text.isprintable() and "  " not in text:  # all white space but the space itself is not printable
        return text.strip(" ")
    return " ".join(text.split())


def _is_name(text: str) -> bool:
    return text.isprintable() and len(text) <= MAX_NAME and not text.startswith("-")


@frozen(kw_only=True)
class Header:
    """What a script says of itself. Each text is one line, its words divided by one space; `parse` makes them so.

    Attributes:
        name: what it is called; empty for what its file is called.
        description, inputs, outputs: in words; empty for what it does not say.
        tags: words to find it by.
        timeout: seconds that it may run; `None` if it does not say.
        task_class: one of `TASK_CLASSES`; `None` if it does not say.
        problems: what was not understood, each with its line.
        limit_problem: the one of them because of which it is not known how long the script may run; or empty.
    """

    name: str = ""
    description: str = ""
    inputs: str = ""
    outputs: str = ""
    tags: tuple[str, ...] = ()
    timeout: float | None = None
    task_class: str | None = None
    problems: tuple[str, ...] = ()
    limit_problem: str = ""

    @property
    def limit(self) -> float | None:
        """Seconds that the script may run: its timeout, else that of its class, else `None`."""
        if self.timeout is not None or self.task_class is None:
            return self.timeout
        return TASK_CLASSES[self.task_class]


def parse(text: str, *, whole: bool = True) -> Header:
    """The header at the top of a script's text. Never raises.

    Args:
        text: the script, or its beginning.
        whole: this is all of the script. Else a header that has not ended here is told as a problem.
    """
    problems: list[str] = []
    found: dict[str, tuple[int, list[str]]] = {}  # key: its line, and the lines of its value
    value: list[str] | None = None  # of the key that a line without a colon would go on with
    at, number = (1 if text.startswith("\ufeff") else 0), 0
    if text.startswith("#!", at):
        at, number = text.find("\n", at) + 1 or len(text), 1
    while at < len(text):
        line = _LINE.match(text, at)
        if line is None:  # code
            break
        at, number = line.end(), number + 1
        word, rest = line.groups()
        if rest is None:  # an empty line
            value = None
        elif word is not None:
            key = word if word in _KEYS else _key(word)
            value = [rest]  # also of a key that is not looked at any more
            if key in found:
                problems.append(f"line {number}: {key} is said again; line {found[key][0]} counts")
            elif key in _KEYS:
                found[key] = (number, value)
        elif rest and value is not None and not _RULE.fullmatch(rest):
            value.append(rest)
    else:
        if not whole:
            problems.append("the header is too long; what comes after its beginning was not read")
    return _header(found, problems)


def render(header: Header, comment: str = "#") -> str:
    """The comments that say what `header` says: `parse` makes an equal one of them, if `parse` could have made it.

    Args:
        header: what to say.
        comment: what begins a comment in the script's language: `#` or `//`.
    """
    values = {
        "name": header.name,
        "description": header.description,
        "inputs": header.inputs,
        "outputs": header.outputs,
        "tags": _rendered_tags(header.tags),
        "timeout": "" if header.timeout is None else repr(float(header.timeout)).removesuffix(".0"),
        "task_class": header.task_class or "",
    }
    return "".join(f"{comment} {key}: {_one_line(value)}\n" for key, value in values.items() if value)


def _key(word: str) -> str:
    return "_".join(word.replace("-", " ").replace("_", " ").split()).lower()


def _header(found: dict[str, tuple[int, list[str]]], problems: list[str]) -> Header:
    values = {key: _one_line(lines[0] if len(lines) == 1 else " ".join(lines)) for key, (_, lines) in found.items()}
    said = values.get

    def problem(key: str, rule: str) -> str:
        number, text = found[key][0], values[key]
        shown = text if len(text) <= _CLIP else text[: _CLIP - 1] + "…"
        problems.append(f"line {number}: {key} is {shown!r}, but must be {rule}")
        return problems[-1]

    limit_problem, timeout, task_class, name = "", None, None, said("name", "")
    if not _is_name(name):
        problem("name", f"{_NAME_RULE}; the name of the file counts")
        name = ""
    if text := said("timeout"):
        timeout = _seconds(text)
        if timeout is None:
            limit_problem = problem("timeout", _TIMEOUT_RULE)
    if text := said("task_class"):
        task_class = text.upper().replace("-", "_").replace(" ", "_")
        if task_class not in TASK_CLASSES:
            told = problem("task_class", f"one of {', '.join(TASK_CLASSES)}{_meant(task_class[:_MOST_LETTERS])}")
            # Where the timeout is said, it alone counts.
            limit_problem = limit_problem or (told if timeout is None else "")
            task_class = None
    return Header(
        name=name,
        description=said("description", ""),
        inputs=said("inputs", ""),
        outputs=said("outputs", ""),
        tags=_split(values["tags"]) if "tags" in values else (),
        timeout=timeout,
        task_class=task_class,
        problems=tuple(problems),
        limit_problem=limit_problem,
    )


@lru_cache(64)  # the same mistake is in many a script
def _meant(task_class: str) -> str:
    nearest = difflib.get_close_matches(task_class, TASK_CLASSES, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _seconds(text: str) -> float | None:
    if len(text) > _MOST_LETTERS:
        return None
    match = _TIMEOUT.fullmatch(text.lower())
    if match is None or match[2] not in _UNITS:
        return None
    seconds = float(match[1]) * _UNITS[match[2]]
    return seconds if 0 < seconds < math.inf else None


def _split(text: str) -> tuple[str, ...]:
    """Each tag once."""
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    tags = [_one_line(tag) for tag in text.split(",")] if "," in text else text.split()
    return tuple(dict.fromkeys(tag for tag in tags if tag))


def _rendered_tags(tags: tuple[str, ...]) -> str:
    text = ", ".join(tags)
    if len(tags) == 1 and " " in text:  # a comma, lest its words be taken for tags
        text += ","
    return f"[{text}]" if text.startswith("[") and text.endswith("]") else text
