"""What everybody's output is compared with: the stock model in fp64.

Each note is run alone and without padding, which also proves that the padded contenders mask rightly. The
weights are those of the precision under test: the error is the arithmetic's, not that of rounding weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.harness import cache
from benchmarks.harness.cells import Cell, make_batch
from benchmarks.harness.sources import ModelSource, load_stock

Outputs = dict[str, npt.NDArray[np.floating]]


@dataclass(frozen=True)
class OutputError:
    relative: float
    """Frobenius norm of the difference over that of the reference."""
    max_abs: float

    def as_dict(self) -> dict[str, float]:
        return {"relative": self.relative, "max_abs": self.max_abs}


def output_error(output: npt.NDArray[np.floating], reference: npt.NDArray[np.floating]) -> OutputError:
    if output.shape != reference.shape:
        raise ValueError(f"output has shape {output.shape}, the reference {reference.shape}")
    difference = output.astype(np.float64) - reference
    relative = float(np.linalg.norm(difference) / np.linalg.norm(reference))
    return OutputError(relative, float(np.abs(difference).max()))


def reference_outputs(source: ModelSource, precision: str, cell: Cell, threads: int) -> Outputs:
    """`last_hidden_state` [real tokens, hidden] and `pooler_output` [batch, hidden] in fp64, cached."""
    name = f"{source.name}-{precision}-{cell.name}"
    facts = cache.key(
        model=source.identity,
        lengths=cell.lengths,
        transformers=cache.version("transformers"),
        torch=cache.version("torch"),
    )
    folder = cache.ensure(
        cache.CACHE / "references" / f"{name}-{facts}",
        "reference",
        source.name,
        precision,
        cell.name,
        threads=threads,
    )
    with np.load(folder / "outputs.npz") as arrays:
        return dict(arrays)


def save_reference(source: ModelSource, precision: str, cell: Cell, folder: Path) -> None:
    import torch

    model = load_stock(source, precision).double()
    batch = make_batch(cell, source.vocab_size)
    hidden, pooled = [], []
    with torch.inference_mode():
        for row, length in enumerate(cell.lengths):
            note = {name: torch.from_numpy(a[row : row + 1, :length]) for name, a in batch.as_dict().items()}
            outputs = model(**note)
            hidden.append(outputs.last_hidden_state[0].numpy())
            pooled.append(outputs.pooler_output[0].numpy())
    np.savez(folder / "outputs.npz", last_hidden_state=np.concatenate(hidden), pooler_output=np.stack(pooled))
