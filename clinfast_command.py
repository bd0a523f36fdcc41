"""The command `clinfast`: its options, and who carries them out.

It stands beside the package because importing that imports torch, and `clinfast --help` is to answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

PASSED, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
CELLS = "1x16,1x128,1x384,8x128,ragged32"


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, where argparse would print the usage as well."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def wholes(text: str) -> list[int]:
    return [whole(name) for name in names(text)]


def difference(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def names(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return found


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="clinfast",
        description="Faster BERT-family encoders with the same outputs: what this machine has, a check on your own "
        "model and texts, and a race against what else is installed. Nothing here goes online.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    info = commands.add_parser("info", help="what this machine has and which models are served")
    info.add_argument("--json", action="store_true", help="print JSON instead of tables")

    verify = commands.add_parser(
        "verify",
        help="hold the fast path against stock and float64, on your model and texts",
        description="Errors of clinfast and of stock against float64, and labels that agree, over paddings, lengths, "
        "precisions and batch compositions. Exit status: 0 passed, 1 failed, 2 bad input.",
    )
    verify.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="a folder that save_pretrained() wrote")
    verify.add_argument(
        "--texts", type=Path, required=True, metavar="FILE",
        help=".txt with one text a line, .jsonl with a field 'text', or a folder of .txt files",
    )  # fmt: skip
    verify.add_argument(
        "--precision", type=names, nargs="+", metavar="P", help="fp32, bf16 (default: all that are served here)"
    )
    verify.add_argument(
        "--threshold", type=difference, metavar="X",
        help="largest difference from stock that passes, in every precision that is measured (default: our error at "
        "most twice stock's own)",
    )  # fmt: skip
    verify.add_argument("--batch-size", type=whole, default=8, metavar="N", help="notes a batch (8)")
    verify.add_argument("--max-length", type=whole, metavar="N", help="cut notes at N tokens (the model's longest)")
    verify.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")

    bench = commands.add_parser(
        "bench",
        help="time your model before and after, and against installed peers",
        description="Each contender in a process of its own, in alternating rounds, after its output was checked "
        "against float64. Exit status: 0 measured, 1 clinfast cannot run the model or is not exact, 2 bad input.",
    )
    bench.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="a folder that save_pretrained() wrote")
    bench.add_argument("--texts", type=Path, metavar="FILE", help="the notes of raggedN cells (as for verify)")
    bench.add_argument(
        "--cells", type=names, metavar="LIST", help=f"notes x tokens, or raggedN (default: {CELLS})"
    )
    bench.add_argument(
        "--precision", type=names, nargs="+", metavar="P", help="fp32, bf16 (default: the model's own)"
    )
    bench.add_argument(
        "--peers", type=names, default=["auto"], metavar="LIST",
        help="auto (those that are installed), none, or names of torch_compile, onnxruntime, openvino, ctranslate2",
    )  # fmt: skip
    bench.add_argument("--rounds", type=whole, metavar="N", help="rounds a cell (default: what fits a minute, 3 to 15)")
    bench.add_argument("--threads", type=whole, metavar="N", help="of every contender (default: one a core)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="also draw the speeds (.png, .svg or .pdf)")
    bench.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="keep exported models there for the next time (never texts)"
    )
    tune = commands.add_parser(
        "tune",
        help="time the GPU kernels' tiles, and the backends against each other, on this machine's card",
        description="Writes a tuning table for the card: tiles, the fastest backend of each op and size, and whether "
        "programmatic dependent launch gains; the environment variable CLINFAST_TUNING_TABLE puts it to use. Exit "
        "status: 0 written, 2 no GPU or bad input.",
    )
    tune.add_argument("--output", type=Path, default=Path("clinfast-tuning.json"), metavar="FILE", help="the table")
    tune.add_argument(
        "--linear", type=names, default=["384x1536", "768x3072", "1024x4096"], metavar="LIST",
        help="in_features x out_features of the products with an activation (384x1536,768x3072,1024x4096)",
    )  # fmt: skip
    tune.add_argument(
        "--head-dims", type=wholes, default=[32, 64], metavar="LIST", help="head dimensions of attention (32,64)"
    )
    tune.add_argument("--skip-tiles", action="store_true", help="race the backends only, with the tiles that there are")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = parser().parse_args(arguments)
    name = f"clinfast {options.command}"
    for package in ["rich"] + ["matplotlib"] * (getattr(options, "plot", None) is not None):
        if importlib.util.find_spec(package) is None:
            print(f"{name}: {package} is not installed; pip install 'clinfast[cli]' brings it", file=sys.stderr)
            return BAD_INPUT
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from clinfast.model_folder import BadInput

    try:
        status: int = importlib.import_module(f"clinfast.cli.{options.command}").run(options)
    except BadInput as problem:
        print(f"{name}: {problem}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
