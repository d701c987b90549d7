"""uvicorn's HTTP/1.1 with a limit on how long a client may take to send a request's headers, which uvicorn lacks."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 15.0


class PatientProtocol(H11Protocol):
    """Closes a connection on which no request has become complete for HEADER_SECONDS, unless one is being answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start watching."""
        super().connection_made(transport)
        self._watch: Any = self.loop.call_later(HEADER_SECONDS, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        self._watch.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        waiting = self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)
        if waiting and not self.transport.is_closing():
            self.transport.close()
            return
        self._watch = self.loop.call_later(HEADER_SECONDS, self._close_if_idle)
