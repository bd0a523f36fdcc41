"""Makes one cached thing: `python -m benchmarks.harness.build WHAT... FOLDER` (called by `cache.ensure`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.harness.cells import parse_cell
from benchmarks.harness.contenders import contender_class
from benchmarks.harness.reference import save_reference
from benchmarks.harness.sources import model_source, save_bert_base


def main(arguments: list[str]) -> None:
    threads = int(os.environ["OMP_NUM_THREADS"])
    match arguments:
        case ["model", "bert-base", folder]:
            save_bert_base(Path(folder))
        case ["reference", model, precision, cell, folder]:
            save_reference(model_source(model, threads), precision, parse_cell(cell), Path(folder))
        case ["artefact", contender, model, precision, folder]:
            contender_class(contender).build(model_source(model, threads), precision, Path(folder))
        case _:
            raise SystemExit(f"cannot build {' '.join(arguments)!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
