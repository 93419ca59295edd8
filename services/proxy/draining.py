"""How the public port ends without anybody's connection being reset under a request.

HTTP/1.1 has no word for "do not ask again" but the header of an answer, so an end takes stages.
First every answer says `connection: close`; then nothing listens any more, but who is connected
may still ask once; in the end what is asked gets a 503 that says when to come again. A connection
on which nothing is asked is half-closed and read for a moment longer: a request that crosses our
end meets an orderly one, never a reset.
"""

import asyncio
from typing import Any, Final

from litestar.types import ASGIApp, Receive, Scope, Send

from services.proxy import refusals
from services.proxy.inbound import request_id_of
from services.proxy.paths import ROUTES
from services.proxy.refusals import Dialect

IDLE_S: Final = 0.5
"""An idle connection gets this long to ask once more, from the end of listening on."""
CROSSING_S: Final = 1.0
"""A half-closed connection gets this long to be closed by the client."""
READ_S: Final = 5.0
"""The body of a refused request is read for this long: who is cut off sees no answer."""
_DIALECTS: Final = {route.path: route.dialect for route in ROUTES}


class Ending:
    """How far the end has come; one for all connections of a server."""

    __slots__ = ("leaving", "refused", "refusing", "unheard_s")

    def __init__(self) -> None:
        self.leaving = False
        """Every answer from now on is the last one of its connection."""
        self.refusing = False
        """Requests from now on get 503."""
        self.unheard_s: float | None = None
        """When listening ended, on the loop's clock."""
        self.refused = 0


class Refuser:
    """Answers in the application's stead once the end is near: 503, except to who reads."""

    def __init__(self, app: ASGIApp, ending: Ending, *, max_body_bytes: int) -> None:
        self._app = app
        self._ending = ending
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Be the application."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._ending.refused += 1
        if not await self._read(receive):
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        refusal = refusals.shutting_down()
        body = refusal.body(_DIALECTS.get(scope["path"], Dialect.OPENAI))
        headers = refusal.headers(request_id_of(given), body)
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _read(self, receive: Receive) -> bool:
        """Read the body, within bounds; tell whether the client is still there."""
        left_bytes = self._max_body_bytes
        try:
            async with asyncio.timeout(READ_S):
                while left_bytes > 0:
                    message: Any = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    if not message.get("more_body"):
                        return True
                    left_bytes -= len(message.get("body", b""))
        except TimeoutError:
            pass
        return True
