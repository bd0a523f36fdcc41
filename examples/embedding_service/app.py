"""The HTTP side: what is asked is checked here, computed by the batcher, and counted."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import common
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field

import clinfast
from embedding_service.batcher import Batcher, Closed, Full
from embedding_service.metrics import Metrics
from embedding_service.settings import Settings
from embedding_service.size_limit import SizeLimit

STOCK_BATCH = 32
log = logging.getLogger("uvicorn.error")


class EmbedRequest(BaseModel):
    texts: list[str] = Field(description="one or more texts, none of them empty")
    truncate: bool = Field(default=False, description="cut what is too long, rather than refuse it")


class Refused(Exception):
    """An answer other than 200, with the sentence that says why."""

    def __init__(self, status: int, sentence: str, retry_after: float | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        # At least a second: the header takes whole ones.
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}


class Embedder:
    """The model, made fast, behind a batcher; `tokenizer` only counts.

    It is a copy: one fast tokenizer asked for two paddings from two threads mixes them up.
    """

    def __init__(self, settings: Settings) -> None:
        self.model: Any = common.load_sentence_transformer(settings.model)
        self.fast = common.make_fast(self.model, precision=settings.precision, threads=settings.threads or None)
        self.tokenizer: Any = copy.deepcopy(self.model.tokenizer)
        self.limit: int = self.model.max_seq_length or common.token_limit(self.model, self.tokenizer)
        self.dimension: int = self.encode(["warm up", "warm up " * self.limit]).shape[1]
        self.count(["warm up"])
        self.batcher = Batcher(
            self.encode, window=settings.window_ms / 1000, token_budget=settings.token_budget,
            queue_tokens=settings.queue_tokens,
        )  # fmt: skip

    def encode(self, texts: list[str]) -> Any:
        """float32 [texts, dimension]; one batch where padding costs nothing."""
        size = len(texts) if self.fast else STOCK_BATCH
        return self.model.encode(texts, batch_size=size, convert_to_numpy=True, show_progress_bar=False)

    def count(self, texts: list[str]) -> list[int]:
        """Tokens of each text, special ones included."""
        return [len(ids) for ids in self.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]]


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service; reads the environment where no settings are given, and the model when it starts."""
    settings = settings or Settings.from_environment()
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        embedder = await run_in_threadpool(Embedder, settings)
        app.state.embedder = embedder
        log.info("serving %s, %d numbers a text, %d tokens a text", settings.model, embedder.dimension, embedder.limit)
        yield
        # In a thread, so that this loop can send the answers meanwhile.
        if not await run_in_threadpool(embedder.batcher.close, settings.drain_seconds):
            log.warning("requests were left after %d seconds", settings.drain_seconds)
        log.info(common.summary(embedder.model))

    app = FastAPI(title="Sentence embeddings", lifespan=lifespan)
    app.add_middleware(SizeLimit, most=settings.max_bytes, refused=metrics.count_request)

    @app.post("/embed")
    async def embed(body: EmbedRequest, request: Request) -> Response:
        begin = time.perf_counter()
        embedder: Embedder = request.app.state.embedder
        counts = await run_in_threadpool(check, embedder, body, settings)
        try:
            answer = asyncio.wrap_future(embedder.batcher.submit(body.texts, sum(counts)))
        except Full as full:
            raise Refused(503, f"{full}; try again later", full.retry_after) from full
        except Closed as closed:
            raise Refused(503, str(closed), 1) from closed
        try:
            rows = await unless_gone(answer, request)
        except Closed as closed:
            raise Refused(503, str(closed), 1) from closed
        if rows is None:
            metrics.count_request(499)
            return Response(status_code=499)
        metrics.count_request(200, time.perf_counter() - begin)
        return JSONResponse({"embeddings": rows.tolist(), "dimension": embedder.dimension, "tokens": counts})

    @app.get("/health")
    async def health(request: Request) -> JSONResponse:
        embedder: Embedder = request.app.state.embedder
        alive = embedder.batcher.alive
        told = {"status": "ok" if alive else "shutting down", "model": settings.model.resolve().name}
        facts = {"dimension": embedder.dimension, "max_tokens": embedder.limit}
        return JSONResponse(told | facts, status_code=200 if alive else 503)

    @app.get("/metrics")
    async def show_metrics(request: Request) -> PlainTextResponse:
        embedder: Embedder = request.app.state.embedder
        text = metrics.render(embedder.batcher, clinfast.report(embedder.model))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.exception_handler(Refused)
    async def refuse(request: Request, refused: Refused) -> JSONResponse:
        metrics.count_request(refused.status)
        return JSONResponse({"detail": str(refused)}, refused.status, refused.headers)

    @app.exception_handler(RequestValidationError)
    async def explain(request: Request, problem: RequestValidationError) -> JSONResponse:
        metrics.count_request(422)
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        sentence = f"{where or 'the body'}: {first['msg']}; send {{\"texts\": [\"...\"]}} as JSON"
        return JSONResponse({"detail": sentence}, 422)

    @app.exception_handler(Exception)
    async def fail(request: Request, problem: Exception) -> JSONResponse:
        metrics.count_request(500)
        return JSONResponse({"detail": "the embedding failed; the service's log says why"}, 500)

    return app


def check(embedder: Embedder, body: EmbedRequest, settings: Settings) -> list[int]:
    """Tokens that each text costs; raises `Refused`."""
    if not body.texts:
        raise Refused(422, "texts is empty; send at least one")
    if len(body.texts) > settings.max_texts:
        raise Refused(413, f"{len(body.texts)} texts are more than the {settings.max_texts} of a request")
    for index, text in enumerate(body.texts):
        if not text.strip():
            raise Refused(422, f"texts[{index}] is empty")
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise Refused(422, f"texts[{index}] holds half a character (a lone surrogate)") from problem
    counts = embedder.count(body.texts)
    for index, count in enumerate(counts):
        if count > embedder.limit and not body.truncate:
            raise Refused(
                413,
                f"texts[{index}] has {count} tokens and the model reads {embedder.limit}; split it, or send "
                '"truncate": true to have it cut',
            )
    return [min(count, embedder.limit) for count in counts]


async def unless_gone(answer: asyncio.Future[Any], request: Request) -> Any:
    """The answer, or None where the client has hung up first: what waits is then cancelled."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        return await answer if answer.done() else None
    finally:
        gone.cancel()
        answer.cancel()
