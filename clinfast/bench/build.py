"""Makes one cached thing: `python -m clinfast.bench.build WHAT... FOLDER` (called by `cache.ensure`)."""

from __future__ import annotations

import sys
from pathlib import Path

from clinfast.bench.cells import load_batch
from clinfast.bench.contenders import contender_class
from clinfast.bench.contenders.base import CannotRun
from clinfast.bench.reference import save_reference
from clinfast.bench.sources import ModelSource
from clinfast.model_folder import BadInput


def main(arguments: list[str]) -> None:
    match arguments:
        case ["reference", name, model, precision, batch, folder]:
            save_reference(ModelSource(name, Path(model)), precision, load_batch(Path(batch)), Path(folder))
        case ["artefact", contender, name, model, precision, folder]:
            contender_class(contender).build(ModelSource(name, Path(model)), precision, Path(folder))
        case _:
            raise SystemExit(f"cannot build {' '.join(arguments)!r}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (CannotRun, BadInput) as error:
        raise SystemExit(str(error)) from None
