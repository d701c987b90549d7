"""uvicorn's HTTP/1.1 with a limit on how long a client may take to send a request's headers, which uvicorn lacks."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 15.0
_IN_WORK = object()


class PatientProtocol(H11Protocol):
    """Closes a connection that for HEADER_SECONDS has brought no complete request, unless one is being answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start watching."""
        super().connection_made(transport)
        self._seen: Any = self.cycle  # the last answered request at the last look
        self._watch = self.loop.call_later(HEADER_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Close what was idle all the time since the last look; a request in between leaves another cycle."""
        idle = self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)
        if idle and self._seen is self.cycle and not self.transport.is_closing():
            self.transport.close()
            return
        self._seen = self.cycle if idle else _IN_WORK
        self._watch = self.loop.call_later(HEADER_SECONDS, self._look)
