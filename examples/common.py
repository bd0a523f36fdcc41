"""What the examples share: a model folder read offline and made fast, and plain sentences where something is wrong."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before transformers is imported, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch
from torch import nn

import clinfast

UNKNOWN_LIMIT = 512


class Problem(Exception):
    """Something the reader can put right; the message is the whole explanation."""


def run(main: Callable[[], int]) -> int:
    """Call `main`; returns its exit status, or 2 after a `Problem` and 130 after Ctrl-C, each told in one line."""
    name = Path(sys.argv[0]).name
    try:
        return main()
    except (Problem, clinfast.StrictError) as problem:
        print(f"{name}: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="folder of a transformers model")
    group.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="what clinfast computes in (the model's)"
    )
    group.add_argument("--threads", type=positive, metavar="N", help="threads to compute with (torch's choice)")
    group.add_argument("--strict", action="store_true", help="stop rather than run any call without clinfast")
    group.add_argument(
        "--token-budget", type=positive, default=4096, metavar="N", help="tokens computed at once (%(default)s)"
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of `folder`, with a padding token; raises `Problem`."""
    from transformers import AutoTokenizer

    with _told(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(_model_folder(folder)), local_files_only=True)
    if tokenizer.pad_token_id is None:
        raise Problem(f"the tokenizer in {folder} has no padding token, so it is not an encoder's")
    return tokenizer


def load_model(folder: Path, auto_class: str) -> Any:
    """The model of `folder`, in eval mode.

    Args:
        folder: holds `config.json` and the weights.
        auto_class: `"AutoModel"`, `"AutoModelForTokenClassification"`, and so on.

    Raises:
        Problem: no such folder, not readable, or a head that would be made of random numbers.
    """
    import transformers

    _quiet()
    with _told(folder, "model"):
        factory = getattr(transformers, auto_class)
        model, loading = factory.from_pretrained(
            str(_model_folder(folder)), local_files_only=True, output_loading_info=True
        )
    missing = sorted(loading["missing_keys"])
    if missing and auto_class != "AutoModel":
        raise Problem(
            f"the model in {folder} was not trained for this: it has no {missing[0]}, so its answers would be random"
        )
    # Half precision is for GPUs; on a CPU it is slow and clinfast does not serve it.
    return (model.float() if model.dtype is torch.float16 else model).eval()


def load_sentence_transformer(folder: Path) -> Any:
    """The `SentenceTransformer` of `folder`, on the CPU; raises `Problem`."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as missing:
        raise Problem(f"{folder} needs sentence-transformers; pip install sentence-transformers") from missing
    _quiet()
    with _told(folder, "model"):
        model = SentenceTransformer(str(_model_folder(folder)), device="cpu", local_files_only=True).eval()
    return model.float() if model.dtype is torch.float16 else model


def _quiet() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _model_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise Problem(f"the model folder {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise Problem(f"{folder} is not the folder of a model: it holds no config.json")
    return folder


@contextlib.contextmanager
def _told(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except Problem:
        raise
    except Exception as problem:
        reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
        raise Problem(f"the {what} in {folder} cannot be loaded: {reason}") from problem


def make_fast(model: Any, *, precision: str = "auto", strict: bool = False, threads: int | None = None) -> bool:
    """Optimize `model` where clinfast can, in place.

    Returns:
        Whether padding is free from now on: True where every encoder in it is optimized.

    Raises:
        Problem: it cannot be optimized, and `strict` or a precision was asked for.
    """
    if threads:
        torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            # What was left stock is told by `summary`.
            warnings.simplefilter("ignore", clinfast.ClinfastWarning)
            clinfast.optimize(model, precision=precision, strict=strict, inference_only=True)
    except (ValueError, clinfast.Unsupported) as problem:
        if strict or precision != "auto":
            raise Problem(str(problem)) from problem
        print(f"runs without clinfast: {problem}", file=sys.stderr)
        return False
    units = clinfast.report(model).units
    return bool(units) and all(unit.refused is None for unit in units)


def summary(model: Any) -> str:
    """One line on how the calls ran, with the reasons of those that ran stock."""
    report = clinfast.report(model)
    reasons = [f"{count} x {reason}" for reason, count in sorted(report.fallbacks.items())]
    reasons += [unit.refused for unit in report.units if unit.refused is not None]
    return str(report).partition("\n")[0] + (f" ({'; '.join(reasons)})" if reasons else "")


def token_limit(model: nn.Module, tokenizer: Any) -> int:
    """Most tokens of a note that the model reads at once, special tokens included."""
    limits = []
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # Families that count positions from the padding id on (RoBERTa and its kin) lose those rows.
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    if not limits:
        limits.append(getattr(getattr(model, "config", None), "max_position_embeddings", None) or UNKNOWN_LIMIT)
    return min(*limits, tokenizer.model_max_length)


def folder_digest(folder: Path) -> str:
    """SHA-256 over all files of a model folder, so that results of two models are never mixed."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def console() -> Any:
    """Where progress and words for the reader go: stderr."""
    try:
        from rich.console import Console
    except ImportError as missing:
        raise Problem("rich is not installed; pip install rich (or clinfast[examples]) brings it") from missing
    return Console(stderr=True, highlight=False)


def progress(console: Any, what: str) -> Any:
    """A progress bar with the rate in `what` per second and the time left."""
    from rich import progress as parts
    from rich.text import Text

    class Rate(parts.ProgressColumn):
        def render(self, task: parts.Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.1f} {what}/s", style="progress.data.speed")

    class Count(parts.ProgressColumn):
        def render(self, task: parts.Task) -> Text:
            return Text(f"{int(task.completed):,} of {int(task.total or 0):,} {what}", style="progress.download")

    return parts.Progress(
        parts.BarColumn(bar_width=30), Count(), Rate(), parts.TextColumn("ETA"), parts.TimeRemainingColumn(),
        console=console, speed_estimate_period=60,
    )  # fmt: skip
