"""What everybody's output is compared with: the stock model in fp64.

Each note is run alone and without padding, which also proves that the padded contenders mask rightly. The
weights are those of the precision under test: the error is the arithmetic's, not that of rounding weights.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clinfast.bench import cache
from clinfast.bench.cells import Batch, save_batch
from clinfast.bench.sources import ModelSource, load_stock

Outputs = dict[str, npt.NDArray[np.floating]]
SPAN_OUTPUTS = ("start_logits", "end_logits")
WIDEST = 4096


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


def comparable(outputs: Outputs, mask: npt.NDArray[np.bool_]) -> Outputs:
    """What of the outputs is held against the reference: rows of real tokens, [tokens, ...], or of notes, [notes, ...].

    Of rows that are a vocabulary wide, every n-th column: all of them would be gigabytes.
    """
    found = {}
    for name, array in outputs.items():
        per_token = array.shape[:2] == mask.shape and (array.ndim > 2 or name in SPAN_OUTPUTS)
        found[name] = array[mask] if per_token else array
        if found[name].ndim > 1:
            found[name] = found[name][..., :: -(-found[name].shape[-1] // WIDEST)]
    return found


def reference_outputs(
    source: ModelSource, precision: str, batch: Batch, threads: int, *, name: str, keep: bool
) -> Outputs:
    """`comparable` outputs in fp64.

    Args:
        name: of the cell.
        keep: in the cache. Not where the batch is somebody's notes.
    """
    facts = cache.key(
        model=source.identity,
        ids=hashlib.sha256(batch.input_ids.tobytes() + batch.attention_mask.tobytes()).hexdigest(),
        transformers=cache.version("transformers"),
        torch=cache.version("torch"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "batch.npz"
        save_batch(batch, file)
        parent = cache.root() / "references" if keep else Path(scratch)
        folder = cache.ensure(
            parent / f"{source.name}-{precision}-{name}-{facts}",
            "reference", source.name, str(source.folder.resolve()), precision, str(file),
            threads=threads,
        )  # fmt: skip
        with np.load(folder / "outputs.npz") as arrays:
            return dict(arrays)


def save_reference(source: ModelSource, precision: str, batch: Batch, folder: Path) -> None:
    import torch

    model = load_stock(source, precision).double()
    rows: dict[str, list[npt.NDArray[np.floating]]] = {}
    with torch.inference_mode():
        for row, length in enumerate(batch.lengths):
            arrays = batch.of(source.inputs)
            note = {name: torch.from_numpy(array[row : row + 1, :length]) for name, array in arrays.items()}
            for name, array in comparable(arrays_of(model(**note)), np.ones((1, length), bool)).items():
                rows.setdefault(name, []).append(array)
    arrays_by_name: dict[str, Any] = {name: np.concatenate(parts) for name, parts in rows.items()}
    np.savez(folder / "outputs.npz", **arrays_by_name)


def arrays_of(output: Any) -> Outputs:
    """The floating-point tensors of a transformers output, by name; bf16 as fp32."""
    import torch

    tensors = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
    return {
        name: (value.float() if value.dtype is torch.bfloat16 else value).numpy()
        for name, value in tensors.items()
        if value.is_floating_point()
    }
