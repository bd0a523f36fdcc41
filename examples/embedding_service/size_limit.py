"""Refuses a body by its size before any of it is read."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class SizeLimit:
    """ASGI middleware: 411 without a content-length, 413 where it is more than `most` bytes.

    A server holds the body to the length that was announced.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
            if not length.isdecimal():
                refusal = JSONResponse({"detail": "send the body with a content-length"}, 411)
                return await refusal(scope, receive, send)
            if int(length) > self.most:
                sentence = f"the body has {int(length):,} bytes, more than the {self.most:,} of a request"
                return await JSONResponse({"detail": sentence}, 413)(scope, receive, send)
        await self.app(scope, receive, send)
