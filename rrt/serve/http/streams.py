"""Responses that end with their client."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

CLIENT_HAS_GONE = 499
"""The status that is counted for a request whose client did not wait."""
_T = TypeVar("_T")


class EventStream(Response):
    """A response that is sent as it is made, and ends with its client.

    Args:
        end: called at the end, however it comes, with the status: 200, or 499 if the client has gone before.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], end: Callable[[int], None]) -> None:
        # The second is for nginx, which would collect the events.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._events, self._end = events, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = CLIENT_HAS_GONE

        async def send_all() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            with suppress(ClientDisconnect, OSError):
                await unless_gone(receive, send_all())
                status = 200
        finally:
            await self._events.aclose()
            self._end(status)


async def unless_gone(receive: Receive, work: Awaitable[_T]) -> _T:
    """Await `work`; if the client goes before, cancel it and raise `ClientDisconnect`."""

    async def wait_for_end() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_end())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
