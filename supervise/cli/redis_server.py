"""Whether a Redis answers at an address: a few words of its protocol, and no more."""

from __future__ import annotations

import os
import ssl
from typing import Final, final
from urllib.parse import SplitResult, unquote, urlsplit

import trio
from attrs import field, frozen

from supervise.errors import SuperviseError
from supervise.secrets import Masker, Secret

__all__ = ["Address", "RedisTrouble", "address_of", "version_of"]

#: A server that says more than this is none that we know.
MOST: Final = 1024 * 1024
SCHEMES: Final = ("redis", "rediss", "unix")


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
        port = (parts.port if parts else None) or 6379
    except ValueError:
        parts, port = None, 0
    rest = "" if parts is None else parts.path + parts.query + parts.fragment
    if parts is None or parts.scheme not in SCHEMES or "@" in rest or parts.fragment:
        raise RedisTrouble(
            "redis.url is no address of a Redis",
            "write redis://HOST:PORT/0, rediss:// for TLS, or unix:///PATH; in a password, / # ? @ are %2F %23 %3F %40",
        )
    unix = parts.scheme == "unix"
    return Address(
        host=parts.hostname or "127.0.0.1",
        port=port,
        path=unquote(parts.path) if unix else "",
        tls=parts.scheme == "rediss",
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        database="" if unix else parts.path.strip("/"),
    )


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
            return value.strip()
    return ""


async def _connect(address: Address) -> trio.abc.Stream:
    try:
        if address.path:
            return await trio.open_unix_socket(address.path)
        if not address.tls:
            return await trio.open_tcp_stream(address.host, address.port)
        return await trio.open_ssl_over_tcp_stream(address.host, address.port, ssl_context=ssl.create_default_context())
    except OSError as error:
        reason = _reason(error)
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
        self._masker = Masker([address.password])
        self._buffer = b""

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
        if kind == b"$" and text.isascii() and text.isdigit() and int(text) < MOST:
            return (await self._bytes(int(text) + 2))[:-2].decode("utf-8", "replace")
        raise self._no_redis("answers, but not as a Redis does")

    def _refusal(self, command: str, text: str) -> RedisTrouble:
        code = text.split(" ")[0]
        if code == "NOAUTH":
            mend = "put it into the address, in the environment or the file: redis://:PASSWORD@HOST:PORT/0"
            return RedisTrouble(f"{self._address}: it wants a password", mend)
        if command == "AUTH":  # what it says may hold what we have said
            return RedisTrouble(f"{self._address}: it refuses the password ({code[:20]})", "mend that in redis.url")
        said = "".join(letter if letter.isprintable() else " " for letter in self._masker.text(text))[:100]
        return RedisTrouble(f"{self._address}: {command} is refused: {said}", "let this user do that, or name another")

    def _no_redis(self, what: str) -> RedisTrouble:
        return RedisTrouble(
            f"{self._address}: something {what}", "look whether redis.url names a Redis (rediss:// for TLS)"
        )

    async def _line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            await self._more()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    async def _bytes(self, count: int) -> bytes:
        while len(self._buffer) < count:
            await self._more()
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    async def _more(self) -> None:
        data = await self.stream.receive_some()
        if not data:
            raise self._no_redis("closes the connection without an answer")
        self._buffer += data
        if len(self._buffer) > MOST:
            raise self._no_redis("answers, but not as a Redis does")
