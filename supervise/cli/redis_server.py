"""Whether a Redis answers at an address: a few words of its protocol, and no more."""

from __future__ import annotations

import os
import re
import ssl
from functools import partial
from typing import Final, final
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

import trio
from attrs import field, frozen

from supervise.errors import SuperviseError
from supervise.secrets import Masker, Secret

__all__ = ["Address", "RedisTrouble", "address_of", "secrets_of", "version_of"]

#: A server that says more bytes than this, in all, is none that we know; nor one whose lines are longer.
MOST: Final = 256 * 1024
LONGEST_LINE: Final = 4096
#: Digits of the length of a text, at most.
LENGTH: Final = 7
SCHEMES: Final = ("redis", "rediss", "unix")
#: What the answers of a Redis begin with that refuse something. Others may begin with what we have said.
CODES: Final = re.compile(
    "ASK|BUSY|CLUSTERDOWN|DENIED|ERR|LOADING|MASTERDOWN|MISCONF|MOVED|NOAUTH|NOPERM|NOPROTO|NOREPLICAS|OOM|READONLY|"
    "TRYAGAIN|WRONGPASS"
)
#: As the environment has what is no UTF-8.
_decoded = partial(unquote, errors="surrogateescape")


class RedisTrouble(SuperviseError):
    """No Redis can be used at the address.

    Attributes:
        mend: what to do.
    """

    def __init__(self, message: str, mend: str) -> None:
        super().__init__(message)
        self.mend = mend


@frozen
class Address:
    """Where a server is, and how it is spoken to. The password does not show."""

    host: str
    port: int
    path: str
    tls: bool
    user: str
    password: Secret = field(converter=Secret)
    database: str
    secrets: frozenset[Secret] = field(repr=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.path or f"{host}:{self.port}"


def address_of(url: Secret) -> Address:
    """The parts of redis[s]://[[user]:password@]host[:port][/database] or unix://[[user]:password@]/path.

    Raises:
        RedisTrouble: it is no such address. The message tells nothing of it: what is misplaced may be the password.
    """
    try:
        parts: SplitResult | None = urlsplit(url.reveal())
        port = 6379 if parts is None or parts.port is None else parts.port
        asked = {name.lower() for name, _ in parse_qsl(parts.query, max_num_fields=100)} if parts else set()
    except ValueError:
        parts, port = None, 0
    rest = "" if parts is None else parts.path + parts.query + parts.fragment
    if parts is None or parts.scheme not in SCHEMES or "@" in rest or parts.fragment:
        raise RedisTrouble(
            "redis.url is no address of a Redis",
            "write redis://HOST:PORT/0, rediss:// for TLS, or unix:///PATH; in a password, / # ? @ are %2F %23 %3F %40",
        )
    if asked & {"password", "username"}:
        mend = "write them in front of the host, redis://USER:PASSWORD@HOST:PORT/0; / # ? @ in them are %2F %23 %3F %40"
        raise RedisTrouble("redis.url has user or password behind the ?, where they are not looked for", mend)
    unix = parts.scheme == "unix"
    if port == 0 and not unix:
        raise RedisTrouble("redis.url names port 0, where nobody can be", "write redis://HOST:6379/0, or no port")
    return Address(
        host=parts.hostname or "127.0.0.1",
        port=port,
        path=_decoded(parts.path) if unix else "",
        tls=parts.scheme == "rediss",
        user=_decoded(parts.username or ""),
        password=_decoded(parts.password or ""),
        database="" if unix else parts.path.strip("/"),
        secrets=frozenset(secrets_of(url)),
    )


def secrets_of(url: Secret) -> set[Secret]:
    """What of an address, which may be none, is not to be shown: itself, and its password in each way to write it."""
    text = url.reveal()
    found = {text}
    inside = re.match(r"[^/]*//(.*)@", text, re.DOTALL)  # to the last @: one of them may be in the password
    if inside is not None:
        user, _, password = inside[1].partition(":")
        found |= {inside[1], password} if password else {user}
    options = text.partition("?")[2]
    try:
        found |= {value for name, value in parse_qsl(options, max_num_fields=100) if "pass" in name.lower()}
    except ValueError:  # too many of them
        found.add(options)
    found |= {_decoded(each) for each in found}
    for safe in ("", "/"):
        found |= {quote(each, safe=safe, errors="surrogateescape") for each in found if "%" not in each}
    found |= {re.sub("%[0-9A-F]{2}", lambda code: code[0].lower(), each) for each in found}
    return {Secret(each) for each in found if each}


async def version_of(address: Address) -> str:
    """Connect, log in, and ask for the version; empty if the server does not tell. Unbounded: put a bound around it.

    Raises:
        RedisTrouble: nobody is there, or it is no Redis, or it does not let us in.
    """
    talk = _Talk(await _connect(address), address)
    try:
        if address.password:
            await talk.ask("AUTH", *filter(None, [address.user]), address.password.reveal())
        await talk.ask("PING")
        if address.database:
            await talk.ask("SELECT", address.database)
        info = await talk.ask("INFO", "server")
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        reason = error.__cause__ or "the connection broke"
        raise RedisTrouble(f"{address}: {reason}", "look whether redis.url names a Redis (rediss:// for TLS)") from None
    finally:
        await trio.aclose_forcefully(talk.stream)
    for line in info.splitlines():
        name, _, value = line.partition(":")
        if name == "redis_version":
            return value.strip()[:100]
    return ""


async def _connect(address: Address) -> trio.abc.Stream:
    # What looks at files is done in threads, which are left behind where a file system does not answer.
    try:
        if address.path:
            await trio.to_thread.run_sync(os.stat, address.path, abandon_on_cancel=True)
            return await trio.open_unix_socket(address.path)
        if not address.tls:
            return await trio.open_tcp_stream(address.host, address.port)
        context = await trio.to_thread.run_sync(ssl.create_default_context, abandon_on_cancel=True)
        return await trio.open_ssl_over_tcp_stream(address.host, address.port, ssl_context=context)
    except OSError as error:
        reason = _reason(error)
    except ValueError:  # also of encoding; what it says may be anything
        raise RedisTrouble(
            "redis.url names a host or path that cannot be one", "write redis://HOST:PORT/0, or unix:///PATH"
        ) from None
    raise RedisTrouble(f"{address}: {reason}", "start it, or set redis.url (SUPERVISE_REDIS__URL) to where it runs")


def _reason(error: OSError) -> str:
    """In the system's words. Where a host has several addresses, of the first that was tried."""
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if error.errno is None and isinstance(cause, OSError):
        error = cause
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__  # of a name without address


@final
class _Talk:
    """Questions and answers, one after the other, in RESP 2."""

    def __init__(self, stream: trio.abc.Stream, address: Address) -> None:
        self.stream = stream
        self._address = address
        # The user's name is none, but what a server repeats of it is not needed.
        self._masker = Masker([address.password, address.user, quote(address.user, safe=""), *address.secrets])
        self._buffer = b""
        self._read = 0

    async def ask(self, *words: str) -> str:
        """The answer. Raises RedisTrouble, and what the stream raises."""
        parts = [word.encode("utf-8", "surrogateescape") for word in words]
        await self.stream.send_all(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts))
        line = await self._line()
        kind, text = line[:1], line[1:].decode("utf-8", "replace")
        if kind == b"-":
            raise self._refusal(words[0], text)
        if kind == b"+":
            return text
        if kind == b"$" and len(text) <= LENGTH and text.isascii() and text.isdigit() and int(text) < MOST:
            data = await self._bytes(int(text) + 2)
            if data.endswith(b"\r\n"):
                return data[:-2].decode("utf-8", "replace")
        raise self._no_redis("answers, but not as a Redis does")

    def _refusal(self, command: str, text: str) -> RedisTrouble:
        code = text.split(" ")[0]
        if code == "NOAUTH":
            mend = "put it into the address, in the environment or the file: redis://:PASSWORD@HOST:PORT/0"
            return RedisTrouble(f"{self._address}: it wants a password", mend)
        if command == "AUTH":  # what it says may hold what we have said
            why = f" ({code})" if CODES.fullmatch(code) else ""
            return RedisTrouble(f"{self._address}: it refuses the password{why}", "mend that in redis.url")
        if not CODES.fullmatch(code):
            return self._no_redis(f"refuses {command}, but not as a Redis does")
        said = "".join(letter if letter.isprintable() else " " for letter in self._masker.text(text))[:100]
        return RedisTrouble(f"{self._address}: {command} is refused: {said}", "let this user do that, or name another")

    def _no_redis(self, what: str) -> RedisTrouble:
        return RedisTrouble(
            f"{self._address}: something {what}", "look whether redis.url names a Redis (rediss:// for TLS)"
        )

    async def _line(self) -> bytes:
        while b"\r\n" not in self._buffer[: LONGEST_LINE + 2]:
            if len(self._buffer) > LONGEST_LINE:
                raise self._no_redis("answers, but not as a Redis does")
            await self._more()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    async def _bytes(self, count: int) -> bytes:
        while len(self._buffer) < count:
            await self._more()
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    async def _more(self) -> None:
        data = await self.stream.receive_some(64 * 1024)
        if not data:
            raise self._no_redis("closes the connection without an answer")
        self._buffer += data
        self._read += len(data)
        if self._read > MOST:
            raise self._no_redis("answers, but not as a Redis does")
