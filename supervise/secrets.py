"""Secret values: a type that does not print itself, and a masker for everything a child prints.

Masking happens once, at the pipe: what leaves `Masker.feed` goes on to the log, the tails, the parser
and so to events and results. Text that does not come through a pipe (an error's message) goes through
`Masker.text`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Final, final

__all__ = ["MASK", "Masker", "Secret", "is_secret_name", "secret_values"]

MASK: Final = "***"

#: Shorter values are not masked: a secret of three letters would mask half of every text.
SHORTEST: Final = 4

_SECRET_NAME = re.compile(
    r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|AUTH|DSN)S?($|_)", re.IGNORECASE
)
_SECRET_HEADERS = re.compile(r"_CUSTOM_HEADERS$", re.IGNORECASE)


@final
class Secret:
    """A value that is never shown by accident: `str()`, `repr()` and formatting give `***`.

    Use `reveal()` at the one place where the value is needed.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself."""
        return self._value

    def __repr__(self) -> str:
        return MASK

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(MASK, spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __bool__(self) -> bool:
        return bool(self._value)


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name is taken to hold a secret."""
    return bool(_SECRET_NAME.search(name) or _SECRET_HEADERS.search(name))


def secret_values(environment: Mapping[str, str]) -> set[str]:
    """The values in `environment` that are taken for secrets, by the names of their variables."""
    return {value for name, value in environment.items() if is_secret_name(name)}


@final
class Masker:
    """Replaces exact secret values by `***`, in text and in byte streams.

    Args:
        values: the secrets. Their JSON-escaped forms are masked too, since agents print JSON.
    """

    def __init__(self, values: Iterable[str | Secret] = ()) -> None:
        plain = {value.reveal() if isinstance(value, Secret) else value for value in values}
        forms: set[str] = set()
        for value in plain:
            if len(value) < SHORTEST:
                continue
            escaped = json.dumps(value)[1:-1]
            forms |= {
                value,
                escaped,
                escaped.replace("/", r"\/"),
                json.dumps(value, ensure_ascii=False)[1:-1],
            }
        # The longest first: a secret that holds another one is masked whole.
        self._forms = sorted(forms, key=lambda form: (-len(form), form))
        self._bytes = [form.encode("utf-8", "surrogateescape") for form in self._forms]

    def text(self, text: str) -> str:
        """`text` with every secret replaced."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, MASK)
        return text

    def stream(self) -> MaskedStream:
        """A masker for one byte stream, which also finds secrets that are cut between two chunks."""
        return MaskedStream(self._bytes)


@final
class MaskedStream:
    """Masks one byte stream, chunk by chunk. What may be the beginning of a secret is held back."""

    def __init__(self, secrets: list[bytes]) -> None:
        self._secrets = secrets
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """The bytes that can be shown by now."""
        if not self._secrets:
            return chunk
        data = self._held + chunk
        for secret in self._secrets:
            data = data.replace(secret, MASK.encode())
        held = max((_prefix_at_end(data, secret) for secret in self._secrets), default=0)
        self._held = data[len(data) - held :] if held else b""
        return data[: len(data) - held] if held else data

    def close(self) -> bytes:
        """What was held back: the stream has ended, so it was not a secret."""
        rest, self._held = self._held, b""
        return rest


def _prefix_at_end(data: bytes, secret: bytes) -> int:
    """How many bytes at the end of `data` may be the beginning of `secret`."""
    for size in range(min(len(secret) - 1, len(data)), 0, -1):
        if data.endswith(secret[:size]):
            return size
    return 0
