"""Refuses a body by its size before any of it is read."""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class SizeLimit:
    """ASGI middleware: 411 without a content-length, 413 where it is more than `most` bytes.

    A server holds the body to the length that was announced.
    """

    def __init__(self, app: ASGIApp, most: int, refused: Callable[[int], None]) -> None:
        self.app, self.most, self.refused = app, most, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        if refusal is not None:
            self.refused(refusal.status_code)
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if not length.isdecimal():
            return JSONResponse({"detail": "send the body with a content-length"}, 411)
        if int(length) > self.most:
            sentence = f"the body has {int(length):,} bytes, more than the {self.most:,} of a request"
            return JSONResponse({"detail": sentence}, 413)
        return None
