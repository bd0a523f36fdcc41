"""The demo's command and its order of events."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import clinfast
from clinfast.demo.measure import insist, measure, result_of
from clinfast.demo.work import NOTES, load, model_folder, need, tokenise
from clinfast.model_folder import BadInput
from clinfast.texts import read_texts
from clinfast_command import whole

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = "What clinfast does to a real model on this machine."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = _options(arguments)
    try:
        console = need("rich.console", "rich").Console(highlight=False)
        _run(options, console)
    except (BadInput, clinfast.StrictError) as problem:
        print(f"clinfast demo: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("clinfast demo: stopped", file=sys.stderr)
        return 130
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m clinfast.demo", description=DESCRIPTION)
    parser.add_argument("--notes", type=Path, default=NOTES, help="JSON lines, each with a 'text'")
    parser.add_argument("--model", type=Path, help="folder of a BERT model (default: all-MiniLM-L6-v2)")
    parser.add_argument("--batch-size", type=whole, default=32, metavar="N", help="notes a batch (32)")
    parser.add_argument("--rounds", type=whole, default=3, metavar="N", help="timed passes a side (3)")
    parser.add_argument(
        "--timed-batches", type=whole, default=4, metavar="N", help="batches to time, evenly spaced (4)"
    )
    parser.add_argument("--threads", type=whole, metavar="N", help="threads (default: torch's choice)")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for the results")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace, console: Console) -> None:
    need("matplotlib", "matplotlib")
    from clinfast.demo.plot import draw
    from clinfast.demo.tables import comparison, explanation, opening

    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise BadInput(f"--out {options.out} cannot be made: {problem.strerror}") from problem

    notes = _read_notes(options.notes)
    folder = model_folder(options.model)
    with console.status(f"loading {folder.name}"):
        model, tokenizer = load(folder)
        work = tokenise(notes, tokenizer, options)
    info = clinfast.info()
    console.print(f"\n[bold]clinfast demo[/]: {folder.name}, before and after\n")
    console.print(opening(work, options, info))

    report, measured = measure(model, work, options, console)
    result = result_of(folder.name, work, options, info, report, measured)
    console.print(comparison(result))
    console.print(explanation(result))
    insist(result)
    clinfast.restore(model)
    console.print("The model is [bold]restored[/]: it runs its stock forward again.")
    figures, picture = options.out / "demo.json", options.out / "demo.png"
    figures.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(result, work.lengths, picture)
    console.print(f"Figures in [bold]{figures}[/], plot in [bold]{picture}[/].\n")


def _read_notes(path: Path) -> list[str]:
    try:
        return read_texts(path)
    except BadInput as problem:
        if path.exists():
            raise
        raise BadInput(f"{problem}; run from a checkout of the repository, or give --notes FILE") from problem


if __name__ == "__main__":
    sys.exit(main())
