"""Whole applications, tokeniser included, before and after `clinfast.optimize`: `python -m benchmarks applications`.

- `encode`: sentence-transformers `encode` of 1,000 notes with the real all-MiniLM-L6-v2, its defaults (batches of 32,
  sorted by length).
- `cross-encoder`: `CrossEncoder.predict` over 64 pairs of a question and a note, MiniLM's shape, random weights.

In `bf16` the model that is optimised is the fp32 one, as `precision="bf16"` allows, and stock takes part twice: as it
was loaded, and cast to bf16. Sides run in processes of their own, in alternating rounds; those that are not asked are
stopped. Outputs are compared with stock in float64 before anything is timed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from itertools import cycle, islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.harness.sources import minilm_folder
from clinfast.bench import cache

NOTES = Path(__file__).parent / "data" / "notes.jsonl"
COUNTS = {"encode": 1000, "cross-encoder": 64}
COMPARED = 64
QUESTIONS = ("What is the dose?", "¿Qué antecedentes tiene?", "Is there a follow-up visit, and when is it due?")
EXACT = "exact"
# The sides that are timed, by precision; the first is the one whose error bounds ours.
SIDES = {"fp32": ("stock", "clinfast"), "bf16": ("stock bf16", "stock", "clinfast bf16")}
DTYPES = {"fp32": np.finfo(np.float32).eps, "bf16": 2.0**-8}
BUDGET = 2.0


def texts(task: str) -> list[Any]:
    notes = [json.loads(line)["text"] for line in NOTES.read_text(encoding="utf-8").splitlines()]
    chosen = list(islice(cycle(notes), COUNTS[task]))
    return list(zip(cycle(QUESTIONS), chosen)) if task == "cross-encoder" else chosen


def load(task: str, side: str) -> Any:
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    if task == "encode":
        model: Any = SentenceTransformer(str(minilm_folder()), device="cpu")
    else:
        torch.manual_seed(0)
        config = BertConfig.from_pretrained(minilm_folder(), num_labels=1)
        with tempfile.TemporaryDirectory() as folder:
            BertForSequenceClassification(config).save_pretrained(folder)
            AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(folder)
            model = CrossEncoder(folder, device="cpu", max_length=512)
    if side == EXACT:
        model.double()
    if side == "stock bf16":
        model.bfloat16()
    if side.startswith("clinfast"):
        import clinfast

        precision = "bf16" if side.endswith("bf16") else "auto"
        clinfast.optimize(model, strict=True, inference_only=True, precision=precision)
    return model


def serve(connection: Connection, task: str, side: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    model, inputs = load(task, side), texts(task)
    call = model.encode if task == "encode" else model.predict
    while True:
        count = connection.recv()
        start = perf_counter()
        outputs = call(inputs[:count], show_progress_bar=False)
        seconds = perf_counter() - start
        connection.send((seconds, np.asarray(outputs[:COMPARED], dtype=np.float64), peak_memory()))


def peak_memory() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class Side:
    """A process that computes only while it is asked."""

    def __init__(self, task: str, name: str, threads: int) -> None:
        ours, theirs = get_context("spawn").Pipe()
        self.connection = ours
        self.process = get_context("spawn").Process(target=serve, args=(theirs, task, name, threads), daemon=True)
        self.process.start()
        self.pid = self.process.pid or 0

    def run(self, count: int) -> tuple[float, Any, int]:
        os.kill(self.pid, signal.SIGCONT)
        self.connection.send(count)
        while not self.connection.poll(5):
            if not self.process.is_alive():
                raise RuntimeError("a side ended; its error is above")
        reply: tuple[float, Any, int] = self.connection.recv()
        os.kill(self.pid, signal.SIGSTOP)
        return reply

    def close(self) -> None:
        self.process.kill()


def race(task: str, rounds: int, threads: int, precision: str = "fp32") -> dict[str, Any]:
    """Medians in seconds, the ratios of each stock to ours round by round, and all errors against float64.

    Raises:
        AssertionError: our error is beyond twice stock's at the same precision.
    """
    names = SIDES[precision]
    ours = names[-1]
    sides = {name: Side(task, name, threads) for name in (*names, EXACT)}
    try:
        outputs = {name: side.run(COMPARED)[1] for name, side in sides.items()}
        sides.pop(EXACT).close()
        scale = np.abs(outputs[EXACT]).max()
        errors = {name: float(np.abs(outputs[name] - outputs[EXACT]).max() / scale) for name in names}
        assert errors[ours] <= BUDGET * errors[names[0]] + float(DTYPES[precision]), errors
        times: dict[str, list[float]] = {name: [] for name in names}
        memory = {}
        for number in range(rounds):
            for name in names if number % 2 else reversed(names):
                seconds, _, memory[name] = sides[name].run(COUNTS[task])
                times[name].append(seconds)
                print(f"{task}: {name} {seconds:.2f} s", file=sys.stderr)
    finally:
        for side in sides.values():
            side.close()
    ratios = {
        name: [stock / own for stock, own in zip(times[name], times[ours], strict=True)] for name in names[:-1]
    }
    return {
        "texts": COUNTS[task],
        "threads": threads,
        "rounds": rounds,
        "seconds": {name: median(found) for name, found in times.items()},
        "texts_per_second": {name: COUNTS[task] / median(found) for name, found in times.items()},
        "over_clinfast": {
            name: {"median": median(found), "min": min(found), "max": max(found)} for name, found in ratios.items()
        },
        "relative_error": errors,
        "peak_rss_mb": memory,
        "versions": {name: cache.version(name) for name in ("sentence-transformers", "transformers", "torch")},
    }
