"""Rules for values: attrs validators whose message names the field, the value and the rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

Validator = Callable[[Any, Any, Any], None]


def rules(error: type[Exception]) -> Rules:
    """The validators, raising `error`."""
    return Rules(error)


class Rules:
    """A family of validators that raise one error type.

    Each method returns a validator for `attrs.field(validator=…)`.
    """

    def __init__(self, error: type[Exception]) -> None:
        self._error = error

    def check(self, test: Callable[[Any], bool], rule: str, *, hide: bool = False) -> Validator:
        """`test(value)` must hold; `rule` is the text after "must be"; `hide` keeps the value out."""

        def validate(instance: Any, attribute: Any, value: Any) -> None:
            if not test(value):
                owner = getattr(type(instance), "PATH", type(instance).__name__)
                name = f"{owner}.{attribute.name}" if owner else attribute.name
                shown = "" if hide else f" is {_short(value)}, but"
                raise self._error(f"{name}{shown} must be {rule}")

        return validate

    def positive(self, unit: str) -> Validator:
        return self.check(lambda v: is_number(v) and v > 0, f"a number of {unit} above 0")

    def not_negative(self, unit: str) -> Validator:
        return self.check(lambda v: is_number(v) and v >= 0, f"a number of {unit}, 0 or more")

    def count(self, least: int, most: int | None = None) -> Validator:
        return self.check(
            lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least and (most is None or v <= most),
            f"a whole number, {least} or more" if most is None else f"a whole number from {least} to {most}",
        )

    def one_of(self, *choices: str) -> Validator:
        return self.check(lambda v: v in choices, "one of " + ", ".join(choices))

    def instance(self, kind: type | tuple[type, ...], rule: str) -> Validator:
        return self.check(lambda v: isinstance(v, kind), rule)


def is_environment(value: object) -> bool:
    """Whether `value` can be (a part of) a process's environment."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and name and not {"=", "\0"} & {*name} and isinstance(text, str) and "\0" not in text
        for name, text in value.items()
    )


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer past every float
        return False


def _short(value: object) -> str:
    if isinstance(value, PurePath):
        value = str(value)
    elif isinstance(value, tuple):  # as it was written
        value = tuple(str(item) if isinstance(item, PurePath) else item for item in value)
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python will print
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else text[:79] + "…"
