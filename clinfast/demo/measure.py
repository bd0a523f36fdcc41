"""Stock and optimized in alternating rounds of one process, and the figures of both."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import clinfast
from clinfast.demo.work import Batch, Work
from clinfast.engine.spec import Unsupported
from clinfast.model_folder import BadInput

if TYPE_CHECKING:
    from rich.console import Console

STOCK, FAST = "stock", "clinfast"
# Summation order differs, so an error of a few roundings of values of order one is nobody's fault.
ERROR_FLOOR = 1e-6
# Notes of each timed batch that are checked against float64.
SAMPLE = 4


class Measured(NamedTuple):
    """What the rounds gave, by side; embeddings by timed batch, and those of its first notes in float64."""

    seconds: dict[str, list[float]]
    embeddings: dict[str, list[Tensor]]
    references: list[Tensor]
    calls_optimized: int


def mean_pool(hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over real tokens, [notes, tokens, hidden] to [notes, hidden], summed in float64."""
    mask = attention_mask.unsqueeze(-1).double()
    return (hidden_states.double() * mask).sum(1) / mask.sum(1)


def measure(
    model: nn.Module, work: Work, options: argparse.Namespace, console: Console
) -> tuple[Any, Measured]:
    """The report and the figures of all rounds; leaves the model optimized."""
    from rich import progress

    reference_model = copy.deepcopy(model).double()
    try:
        clinfast.optimize(model, strict=True)
    except (ValueError, Unsupported) as problem:
        raise BadInput(str(problem)) from problem
    seconds: dict[str, list[float]] = {STOCK: [], FAST: []}
    embeddings: dict[str, list[Tensor]] = {STOCK: [], FAST: []}
    calls = {STOCK: 0, FAST: 0}
    timed = [work.batches[i] for i in work.timed]
    columns = (
        progress.TextColumn("{task.description:<28}"),
        progress.BarColumn(bar_width=40),
        progress.TextColumn("{task.percentage:>3.0f}%"),
        progress.TimeElapsedColumn(),
    )
    # No refreshing thread: on two cores it would take its share of what is timed.
    bar = progress.Progress(*columns, console=console, transient=True, auto_refresh=False)
    with torch.inference_mode(), bar:
        task = bar.add_task("warming up", total=2 * options.rounds * len(work.timed) + 1)

        def run(side: str, batch: Batch) -> Tensor:
            calls[side] += 1
            with clinfast.disabled(model) if side == STOCK else nullcontext():
                return model(**batch).last_hidden_state

        for side in (STOCK, FAST):
            run(side, _first(timed[0]))
        for number in range(options.rounds):
            for side in (STOCK, FAST) if number % 2 == 0 else (FAST, STOCK):
                bar.update(task, description=f"round {number + 1} of {options.rounds}: {side}", refresh=True)
                total = 0.0
                for batch in timed:
                    begin = time.perf_counter()
                    hidden_states = run(side, batch)
                    total += time.perf_counter() - begin
                    if number == 0:
                        embeddings[side].append(mean_pool(hidden_states, batch["attention_mask"]))
                    bar.update(task, advance=1, refresh=True)
                seconds[side].append(total)
        bar.update(task, description="float64 reference", refresh=True)
        references = [_reference(reference_model, _first(batch)) for batch in timed]
        bar.update(task, advance=1, refresh=True)
    return clinfast.report(model), Measured(seconds, embeddings, references, calls[FAST])


def _first(batch: Batch) -> Batch:
    return {key: value[:SAMPLE] for key, value in batch.items()}


def _reference(model: nn.Module, batch: Batch) -> Tensor:
    """Mean-pooled embeddings in float64, each note alone, so that padding has no part in it."""
    rows = []
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        note = {key: value[row : row + 1, real] for key, value in batch.items()}
        rows.append(mean_pool(model(**note).last_hidden_state, note["attention_mask"]))
    return torch.cat(rows)


def result_of(
    name: str, work: Work, options: argparse.Namespace, info: Any, report: Any, measured: Measured
) -> dict[str, Any]:
    stock, fast = (torch.cat(measured.embeddings[side]) for side in (STOCK, FAST))
    reference = torch.cat(measured.references)
    sides = {}
    for side in (STOCK, FAST):
        passes = measured.seconds[side]
        median = statistics.median(passes)
        sides[side] = {
            "seconds_per_pass": passes,
            "median_seconds_per_pass": median,
            "notes_per_second": work.timed_notes / median,
            "cpu_hours_per_million_notes": median * info.threads / 3600 / work.timed_notes * 1e6,
            "error_against_float64": _largest(
                torch.cat([part[:SAMPLE] for part in measured.embeddings[side]]) - reference
            ),
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
        "calls_optimized": measured.calls_optimized,
        "calls_fast": report.calls_fast,
        "fallbacks": {reason: n for reason, n in report.fallbacks.items() if "disabled(" not in reason},
    }


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def insist(result: dict[str, Any]) -> None:
    """Fail where the demo did not show what it is for."""
    if result["calls_fast"] != result["calls_optimized"]:
        raise BadInput(
            f"only {result['calls_fast']} of {result['calls_optimized']} calls took the fast path; "
            f"the others ran stock: {result['fallbacks']}"
        )
    stock, fast = (result["sides"][side]["error_against_float64"] for side in (STOCK, FAST))
    if not fast <= 2 * stock + ERROR_FLOOR:
        raise BadInput(
            f"the error against float64 is {fast:.1e}, more than twice stock's own {stock:.1e}; "
            "please report it with the table above"
        )
