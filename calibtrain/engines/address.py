"""JSON over HTTP to an address that a user named: bounded in time and size, with patience for a busy server.

Python's own client: no redirect is followed, since it would carry the key to another host.
"""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.error
import urllib.request
from email.message import Message
from http.client import HTTPException
from typing import IO, Any
from urllib.parse import urlsplit

from calibtrain.errors import Unreachable, UserError

KEY_VARIABLE = "CALIBTRAIN_ENGINE_KEY"
MAX_BYTES = 1 << 24
BUSY = (429, 502, 503, 504)
ATTEMPTS = 7
LONGEST_WAIT = 30.0
SHOWN = 300
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect to be an error."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """None: not followed."""
        return


class Address:
    """An OpenAI-compatible base URL, such as http://127.0.0.1:8000/v1.

    The key, where the environment variable `key_variable` holds one, goes into the request's header and nowhere else.
    option: what names the URL, `must`: what the server must take, `absent`: what a path that is not there means, all for
    messages; retried: status codes after which a request is sent again; attempts: how often it is sent. Raises UserError for
    what is no such URL; every call raises it for what the server does not do, and Unreachable where it does not answer.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 300.0,
        first_wait: float = 0.5,
        key_variable: str = KEY_VARIABLE,
        option: str = "--engine",
        must: str = "take prompts as token ids, stop_token_ids and return_token_ids, as vLLM does",
        absent: str = "give the base URL of an OpenAI-compatible server, which ends in /v1",
        retried: tuple[int, ...] = BUSY,
        attempts: int = ATTEMPTS,
    ) -> None:
        self.url = _checked(url, option, key_variable)
        self.told = f"{option}: {self.url}"
        self.timeout = timeout
        self.first_wait = first_wait
        self.key_variable = key_variable
        self.must, self.absent = must, absent
        self.retried, self.attempts = retried, attempts
        self._key = os.environ.get(key_variable, "").strip()
        if not self._key.isprintable() or not self._key.isascii():
            raise UserError(f"{key_variable}: not a key that fits into a header; it holds other than printable ASCII")
        # A proxy for the world is not asked for this machine.
        proxies = urllib.request.ProxyHandler({} if urlsplit(self.url).hostname in LOOPBACK else None)
        self._opener = urllib.request.build_opener(proxies, _NoRedirect)

    def get(self, path: str) -> Any:
        """The JSON at `path`, asked once: a server that is not there is told at once."""
        return self._call(path, None, attempts=1)

    def post(self, path: str, body: dict[str, Any], *, first: bool = False) -> Any:
        """The JSON that answers `body`; a busy server, or a connection that breaks, is tried again.

        first: before any work is done, so that a server that is not there is told at once; a busy one is waited for.
        """
        return self._call(
            path, json.dumps(body).encode(), attempts=self.attempts, connects=1 if first else self.attempts
        )

    def _call(self, path: str, data: bytes | None, attempts: int, connects: int = 1) -> Any:
        for attempt in range(1, attempts + 1):
            wait = min(LONGEST_WAIT, self.first_wait * 2 ** (attempt - 1))
            try:
                return self._parsed(path, self._read(path, data))
            except urllib.error.HTTPError as error:
                with error:
                    if error.code not in self.retried or attempt == attempts:
                        kind = Unreachable if error.code >= 500 or error.code in BUSY else UserError
                        raise kind(self._refusal(path, error)) from None
                    wait = max(wait, _asked_wait(error.headers.get("Retry-After")))
            except (OSError, HTTPException, UnicodeError) as error:  # the last: a host that is no name
                if attempt >= min(attempts, connects) or _timed_out(error):
                    raise Unreachable(self._unreachable(error)) from None
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _read(self, path: str, data: bytes | None) -> bytes:
        headers = {"Accept": "application/json", "User-Agent": "calibtrain"}
        headers |= {"Content-Type": "application/json"} if data is not None else {}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        request = urllib.request.Request(self.url + path, data, headers)
        deadline = time.monotonic() + self.timeout
        parts, size = [], 0
        with self._opener.open(request, timeout=self.timeout) as reply:
            while part := reply.read1(1 << 16):
                parts.append(part)
                size += len(part)
                if size > MAX_BYTES:
                    raise UserError(f"{self.told}: a reply is larger than {MAX_BYTES >> 20} MiB; it is not read")
                if time.monotonic() > deadline:
                    raise TimeoutError
        return b"".join(parts)

    def _parsed(self, path: str, content: bytes) -> Any:
        try:
            return json.loads(content, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.told}{path}: the reply is not JSON ({shown(str(error), 80)}); is this an OpenAI-compatible server, "
                "and does its address end in /v1?"
            ) from None

    def _unreachable(self, error: Exception) -> str:
        if _timed_out(error):
            return f"{self.told}: no answer within {self.timeout:g} s; the server is too busy, or hangs"
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return f"{self.told}: no server answers there ({shown(str(reason))}); start it, or mend the address"

    def _refusal(self, path: str, error: urllib.error.HTTPError) -> str:
        """What an error status means; what the server says of a key is not repeated."""
        if error.code in (401, 403):
            if self._key:
                return f"{self.told}: the server refuses the key in the environment variable {self.key_variable}"
            return f"{self.told}: the server wants a key; put it into the environment variable {self.key_variable}"
        said = self._said(error)
        if error.code in (404, 405) and "model" not in said:
            return f"{self.told}{path}: not found; {self.absent}"
        if 300 <= error.code < 400:
            return f"{self.told}: the server sends on to another address; give that one"
        if error.code in BUSY:
            return f"{self.told}: the server stayed too busy ({error.code}); ask again later"
        if error.code >= 500:
            return f"{self.told}: the server failed ({error.code}: {said}); its log says why"
        return f"{self.told}: the server refuses the request ({error.code}: {said}); it must {self.must}"

    def _said(self, error: urllib.error.HTTPError) -> str:
        try:
            text = error.read(1 << 16).decode("utf-8", "replace")
        except (OSError, HTTPException):
            return "nothing"
        try:
            found = json.loads(text)
            found = found.get("error", found)
            text = str(found.get("message", found) if isinstance(found, dict) else found)
        except (ValueError, AttributeError, RecursionError):
            pass
        return shown(text.replace(self._key, "***") if self._key else text) or "nothing"


def shown(text: str, length: int = SHOWN) -> str:
    """A server's text in one short line, with nothing that a terminal would obey."""
    words = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    return words if len(words) <= length else words[: length - 1] + "…"


def _checked(url: str, option: str, key_variable: str) -> str:
    try:
        parts = urlsplit(url.strip())
        port = parts.port  # raises where it is none
    except ValueError as error:
        raise UserError(f"{option}: {shown(url)!r} is no address ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UserError(f"{option}: {shown(url)!r} is no address; give one such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise UserError(f"{option}: leave the name and password out of the address; a key goes into {key_variable}")
    if parts.query or parts.fragment or any(one.isspace() or not one.isprintable() for one in url.strip()):
        raise UserError(
            f"{option}: {shown(url)!r} holds more than an address; give one such as http://127.0.0.1:8000/v1"
        )
    return url.strip().rstrip("/")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _asked_wait(header: str | None) -> float:
    """Seconds of a Retry-After header, at most LONGEST_WAIT; 0 for a date or anything else."""
    try:
        return min(LONGEST_WAIT, max(0.0, float(header or 0)))
    except ValueError:
        return 0.0


def _timed_out(error: Exception) -> bool:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return isinstance(reason, TimeoutError | socket.timeout)
