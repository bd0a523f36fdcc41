"""The README's figure: `python -m benchmarks.plot RESULT.json --out figure.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from clinfast.bench.cells import CELLS
from clinfast.bench.plot import draw

MODELS = {"bert-base": "BERT-base", "minilm": "all-MiniLM-L6-v2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="bert-base", choices=MODELS)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    cells = [
        results["cells"][key]
        for name in CELLS
        if (key := f"{options.model}/{options.precision}/{name}") in results["cells"]
    ]
    if not cells:
        raise SystemExit(f"{options.results} has no cell of {options.model} {options.precision}")
    figure = draw(cells, results["environments"][cells[-1]["environment"]], MODELS[options.model], options.precision)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=200, facecolor="white")


if __name__ == "__main__":
    main()
