"""What one client may ask of the server: bytes, seconds and requests. Refusals carry their reason."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

CLIENTS_KEPT = 10_000


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the server. Sizes in bytes or tokens, times in seconds."""

    body_bytes: int = 64 * 1024
    question_tokens: int = 512
    requests_per_minute: int = 600  # of one address; 0: as many as it likes
    body_seconds: float = 10.0  # to send a whole body
    answer_seconds: float = 120.0  # to wait for the model
    waiting: int = 512  # requests that may wait for the model
    batch: int = 32  # requests that go through the model together


@dataclass(slots=True)
class _Allowance:
    left: float
    at: float


class RateLimiter:
    """A token bucket for each address, full at the start: bursts up to a quarter minute's requests."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = per_minute / 60
        self.size = max(1.0, per_minute / 4)
        self.clock = clock
        self.allowances: OrderedDict[str, _Allowance] = OrderedDict()

    def seconds_to_wait(self, address: str) -> float:
        """0 and one request taken, or how long until the next would be."""
        if not self.rate:
            return 0.0
        now = self.clock()
        one = self.allowances.setdefault(address, _Allowance(self.size, now))
        self.allowances.move_to_end(address)
        while len(self.allowances) > CLIENTS_KEPT:
            self.allowances.popitem(last=False)
        one.left = min(self.size, one.left + (now - one.at) * self.rate)
        one.at = now
        if one.left < 1:
            return (1 - one.left) / self.rate
        one.left -= 1
        return 0.0


class Refusal(Exception):
    """An answer of status 4xx or 5xx in the shape that clients of OpenAI's API read."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class AddHeaders:
    """ASGI middleware: every response carries these headers, unless it has its own."""

    def __init__(self, app: Application, headers: Mapping[str, str]) -> None:
        self.app = app
        self.headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in self.headers if pair[0] not in own)]
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


class LimitRequests:
    """ASGI middleware: POST bodies are read whole, within a size and a time, before the application sees them."""

    def __init__(self, app: Application, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self.limiter = RateLimiter(limits.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            body = await self._admit(scope, receive)
        except Refusal as refusal:
            await self._discard(receive)
            await _send_refusal(send, refusal)
            return
        if body is None:  # the client went away
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _admit(self, scope: Scope, receive: Receive) -> bytes | None:
        wait = self.limiter.seconds_to_wait((scope.get("client") or ("", 0))[0])
        if wait:
            raise Refusal(
                429,
                f"more than {self.limits.requests_per_minute} requests a minute; come back in {math.ceil(wait)} s",
                code="rate_limit_exceeded",
                retry_after=wait,
            )
        headers = {name.lower(): value for name, value in scope["headers"]}
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            # Also what keeps other sites' forms out: a browser asks before it sends JSON across sites.
            raise Refusal(415, "send JSON, with Content-Type: application/json", code="unsupported_media_type")
        length = headers.get(b"content-length", b"")
        if (length.isdigit() and len(length) > 15) or (length.isdigit() and int(length) > self.limits.body_bytes):
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._read(receive), self.limits.body_seconds)
        except asyncio.TimeoutError:
            raise Refusal(
                408, f"the body did not arrive within {self.limits.body_seconds:g} s", code="request_timeout"
            ) from None

    async def _read(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.limits.body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    async def _discard(self, receive: Receive) -> None:
        """Read on for a while: a client that is still sending would lose its refusal with the connection."""

        async def rest() -> None:
            read = 0
            while read < 64 * self.limits.body_bytes:
                message = await receive()
                read += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(rest(), 1.0)

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body has more than {self.limits.body_bytes} bytes", code="request_too_large")


async def _send_refusal(send: Send, refusal: Refusal) -> None:
    """Answer and close."""
    body = json.dumps(refusal.body()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
