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
_MASK: Final = MASK.encode()

#: Shorter values are not masked: a secret of three letters would mask half of every text.
SHORTEST: Final = 4

_SECRET_NAME = re.compile(
    r"((^|_)(KEY|CREDENTIAL|AUTH|DSN)|APIKEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE)S?($|_)", re.IGNORECASE
)
_SECRET_HEADERS = re.compile(r"_CUSTOM_HEADERS$", re.IGNORECASE)
#: Values that hide nothing, such as those of MAX_THINKING_TOKENS and SKIP_AUTH: masked, they would tear holes
#: into the JSON that agents print.
_PLAIN = re.compile(r"\d{1,9}|true|false|null|none", re.IGNORECASE)


@final
class Secret:
    """A value that is never shown by accident: `str()`, `repr()` and formatting give `***`.

    Use `reveal()` at the one place where the value is needed.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        if not isinstance(value, str):
            raise TypeError(f"a secret is a text, not {type(value).__name__}")
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
    return {value for name, value in environment.items() if is_secret_name(name) and not _PLAIN.fullmatch(value)}


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
            forms.add(value)
            for escaped in (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
                forms |= {escaped, escaped.replace("/", r"\/")}
        # The longest first: a secret that holds another one is masked whole.
        self._forms = sorted(forms, key=lambda form: (-len(form), form))
        self._bytes = sorted({_encoded(form) for form in forms}, key=lambda form: (-len(form), form))
        self._pattern = re.compile("|".join(map(re.escape, self._forms)))
        self._bytes_pattern = re.compile(b"|".join(map(re.escape, self._bytes)))

    def text(self, text: str) -> str:
        """`text` with every secret replaced."""
        # `in` is many times faster than the pattern, and most texts hold no secret.
        return self._pattern.sub(MASK, text) if any(form in text for form in self._forms) else text

    def stream(self) -> MaskedStream:
        """A masker for one byte stream, which also finds secrets that are cut between two chunks."""
        return MaskedStream(self._bytes, self._bytes_pattern)


@final
class MaskedStream:
    """Masks one byte stream, chunk by chunk. What may be the beginning of a secret is held back.

    The cuts make no difference: what comes out, joined, is what masking the whole at once would give. So what
    is held back is never replaced in part; a short secret may be the beginning of a long one.
    """

    def __init__(self, secrets: list[bytes], pattern: re.Pattern[bytes]) -> None:
        self._secrets = secrets
        self._pattern = pattern
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """The bytes that can be shown by now."""
        if not self._secrets:
            return chunk
        data = self._held + chunk
        shown = b""
        start = 0
        open_from = self._open_from(data, 0)
        if any(secret in data for secret in self._secrets):
            parts: list[bytes] = []
            for match in self._pattern.finditer(data):
                if match.start() >= open_from:
                    break
                parts += (data[start : match.start()], _MASK)
                start = match.end()
                if open_from < start:
                    open_from = self._open_from(data, start)
            shown = b"".join(parts)
        self._held = data[open_from:]
        return shown + data[start:open_from]

    def close(self) -> bytes:
        """What was held back: the stream has ended, so it is not the beginning of more."""
        rest, self._held = self._held, b""
        return self._pattern.sub(_MASK, rest) if rest else rest

    def _open_from(self, data: bytes, start: int) -> int:
        """Where, not before `start`, the rest of `data` may be the beginning of a secret."""
        found = len(data)
        for secret in self._secrets:
            at = data.find(secret[:1], max(start, len(data) - len(secret) + 1), found)
            while at != -1:
                if secret.startswith(data[at:]):
                    found = at
                    break
                at = data.find(secret[:1], at + 1, found)
        return found


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")  # as the environment has it
    except UnicodeEncodeError:  # a lone surrogate out of JSON
        return text.encode("utf-8", "surrogatepass")
