"""A stub of the Anthropic Messages API on a loopback port, for tests with the real Claude CLI.

It answers from a script: one `Reply` for each main request, in order. A main request is one that the agent's
loop sends: it offers tools. What else the CLI asks (a title, a quota check, a count of tokens) is answered by
itself and uses no reply. HTTP/1.1, one request for each connection.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from http import HTTPStatus
from itertools import count, islice
from typing import Any, Literal

import trio
from attrs import Factory, define, field, frozen

#: What the CLI is given as its key. No real key has this form.
DUMMY_KEY = "sk-ant-dummy-0f1e2d3c4b5a69788796a5b4c3d2e1f0"

#: What every answer says of its tokens.
USAGE = {
    "input_tokens": 11,
    "output_tokens": 7,
    "cache_read_input_tokens": 5,
    "cache_creation_input_tokens": 3,
}


@frozen
class Text:
    """The model answers with a text, and its turn is over."""

    text: str


@frozen
class Bash:
    """The model calls the tool Bash."""

    command: str


@frozen
class ApiError:
    """An HTTP error with Anthropic's body."""

    status: int
    error: str
    message: str = "an error that the stub was told to give"
    headers: Mapping[str, str] = Factory(dict)


@frozen
class Cut:
    """An answer that is not whole.

    Attributes:
        events: how many of a stream's six events are sent. Three: as far as the text itself.
        how: `reset` and `close` break the connection, with RST and with FIN, in the middle of the body; `end`
            ends the body in good order, only too early.
    """

    text: str = "This text breaks o"
    events: int = 3
    how: Literal["reset", "close", "end"] = "reset"


@frozen
class Hang:
    """No byte of an answer until `MessagesStub.release()`; then `then`."""

    then: Text | Bash = Text("Released.")


Reply = Text | Bash | ApiError | Cut | Hang


@frozen
class Request:
    """What the stub was asked. Headers are not kept."""

    method: str
    path: str
    key_ok: bool
    model: str | None = None
    stream: bool = False
    main: bool = False
    messages: list[dict[str, Any]] = Factory(list)

    def texts(self) -> list[str]:
        """Every text of the conversation so far, tool results included, in order."""
        return [text for message in self.messages for text in _texts(message.get("content"))]


@define(eq=False)
class MessagesStub:
    """The running stub.

    Attributes:
        url: what `ANTHROPIC_BASE_URL` has to be.
        requests: all requests so far.
        unused: the replies that are still to come.
        after: the reply to every main request past the script's end.
    """

    unused: list[Reply]
    after: Reply = Text("The script is over.")
    url: str = ""
    requests: list[Request] = field(factory=list)
    _released: trio.Event = field(factory=trio.Event)
    _asked: trio.Condition = field(factory=trio.Condition)
    _numbers: Iterator[int] = field(factory=lambda: count(1))

    @property
    def main_requests(self) -> list[Request]:
        """The requests that used a reply."""
        return [request for request in self.requests if request.main]

    def release(self) -> None:
        """Let every `Hang` go on, also those to come."""
        self._released.set()

    async def wait_asked(self, number: int) -> None:
        """Return when there have been `number` main requests."""
        async with self._asked:
            while len(self.main_requests) < number:
                await self._asked.wait()

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection."""
        try:
            received = await _receive(stream)
            if received is not None:
                await self._answer(stream, *received)
        except trio.BrokenResourceError:
            pass  # the client has gone: killed, or tired of waiting

    async def _answer(
        self, stream: trio.SocketStream, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> None:
        key_ok = headers.get("x-api-key") == DUMMY_KEY
        if (method, path) == ("POST", "/v1/messages"):
            asked = json.loads(body)
            request = Request(
                method=method,
                path=path,
                key_ok=key_ok,
                model=asked.get("model"),
                stream=bool(asked.get("stream")),
                main=bool(asked.get("tools")),
                messages=asked.get("messages", []),
            )
            await self._note(request)
            await self._reply(stream, request)
            return
        await self._note(Request(method=method, path=path, key_ok=key_ok))
        if (method, path) == ("POST", "/v1/messages/count_tokens"):
            await _send_json(stream, 200, {"input_tokens": USAGE["input_tokens"]})
        elif method in ("GET", "HEAD") and path == "/":
            await _send_json(stream, 200, {}, head=method == "HEAD")
        else:
            error = _error("not_found_error", f"the stub has no {method} {path}")
            await _send_json(stream, 404, error, head=method == "HEAD")

    async def _note(self, request: Request) -> None:
        async with self._asked:
            self.requests.append(request)
            self._asked.notify_all()

    async def _reply(self, stream: trio.SocketStream, request: Request) -> None:
        reply: Reply = Text("A side answer.")
        if request.main:
            reply = self.unused.pop(0) if self.unused else self.after
        if isinstance(reply, Hang):
            await self._released.wait()
            reply = reply.then
        if isinstance(reply, ApiError):
            await _send_json(stream, reply.status, _error(reply.error, reply.message), headers=reply.headers)
            return
        message = _message(reply, request.model, next(self._numbers))
        cut = reply if isinstance(reply, Cut) else None
        if request.stream:
            await _send_events(stream, message, cut)
        else:
            await _send_json(stream, 200, message, half=cut is not None)
        if cut is not None and cut.how == "reset":
            # Lingering for 0 s: the connection is closed with RST instead of FIN.
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def start_stub(nursery: trio.Nursery, *script: Reply, after: Reply | None = None) -> MessagesStub:
    """A stub that lives in `nursery` and answers with `script`, then with `after` for ever."""
    stub = MessagesStub(list(script)) if after is None else MessagesStub(list(script), after)
    (listener,) = await nursery.start(partial(trio.serve_tcp, stub.serve, 0, host="127.0.0.1"))
    host, port = listener.socket.getsockname()
    stub.url = f"http://{host}:{port}"
    return stub


# --- what the API says ---------------------------------------------------------------------------------------


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_stub"}


def _message(reply: Text | Bash | Cut, model: str | None, number: int) -> dict[str, Any]:
    content: dict[str, Any]
    if isinstance(reply, Bash):
        tool_input = {"command": reply.command, "description": "what the test asks for"}
        content = {"type": "tool_use", "id": f"toolu_stub{number:04}", "name": "Bash", "input": tool_input}
    else:
        content = {"type": "text", "text": reply.text}
    return {
        "id": f"msg_stub{number:04}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [content],
        "stop_reason": "tool_use" if isinstance(reply, Bash) else "end_turn",
        "stop_sequence": None,
        "usage": dict(USAGE),
    }


def _events(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """`message` as the events of a stream."""
    (content,) = message["content"]
    if content["type"] == "text":
        empty = {"type": "text", "text": ""}
        delta = {"type": "text_delta", "text": content["text"]}
    else:
        empty = {**content, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(content["input"])}
    begun = {**message, "content": [], "stop_reason": None, "usage": {**message["usage"], "output_tokens": 1}}
    end = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    yield {"type": "message_start", "message": begun}
    yield {"type": "content_block_start", "index": 0, "content_block": empty}
    yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    yield {"type": "message_delta", "delta": end, "usage": {"output_tokens": message["usage"]["output_tokens"]}}
    yield {"type": "message_stop"}


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for block in content:
            yield from _texts(block.get("text") or block.get("content"))


# --- HTTP ----------------------------------------------------------------------------------------------------


async def _receive(stream: trio.SocketStream) -> tuple[str, str, dict[str, str], bytes] | None:
    """Method, path (without its query), headers and body; `None` if the client went before it had asked."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = await stream.receive_some()
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "transfer-encoding" in headers:
        raise AssertionError("the client sends a chunked body, which this stub does not read")
    size = int(headers.get("content-length", 0))
    while len(body) < size:
        more = await stream.receive_some()
        if not more:
            return None
        body += more
    return method, target.partition("?")[0], headers, body


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {_phrase(status)}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "connection: close", "request-id: req_stub", "", ""]).encode()


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:  # such as 529
        return "Overloaded"


async def _send_json(
    stream: trio.SocketStream,
    status: int,
    value: Mapping[str, Any],
    *,
    headers: Mapping[str, str] | None = None,
    head: bool = False,
    half: bool = False,
) -> None:
    body = json.dumps(value).encode()
    sizes = {"content-type": "application/json", "content-length": str(len(body))}
    if head:
        body = b""
    elif half:
        body = body[: len(body) // 2]
    await stream.send_all(_head(status, {**sizes, **(headers or {})}) + body)


async def _send_events(stream: trio.SocketStream, message: Mapping[str, Any], cut: Cut | None) -> None:
    """The message as server-sent events, each of them a chunk of the body."""
    await stream.send_all(
        _head(200, {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"})
    )
    for event in islice(_events(message), None if cut is None else cut.events):
        text = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
        await stream.send_all(f"{len(text):x}\r\n".encode() + text + b"\r\n")
    if cut is None or cut.how == "end":
        await stream.send_all(b"0\r\n\r\n")
