"""The shapes a model is timed on, and the seeded inputs of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

CLS, SEP, FIRST_WORD = 101, 102, 1000
SEED = 20


@dataclass(frozen=True)
class Cell:
    """A batch of notes by their lengths in tokens; everybody gets it padded to the longest."""

    name: str
    lengths: tuple[int, ...]

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def padded_length(self) -> int:
        return max(self.lengths)

    @property
    def tokens_real(self) -> int:
        return sum(self.lengths)

    @property
    def tokens_padded(self) -> int:
        return self.batch_size * self.padded_length


@dataclass(frozen=True)
class Batch:
    """Model inputs as int64 arrays [batch, length]; padding is on the right."""

    input_ids: IntArray
    attention_mask: IntArray
    token_type_ids: IntArray

    def as_dict(self) -> dict[str, IntArray]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "token_type_ids": self.token_type_ids,
        }

    @property
    def lengths(self) -> IntArray:
        return self.attention_mask.sum(axis=1)


def ragged_lengths(
    notes: int, *, median: int = 120, sigma: float = 1.25, longest: int = 512
) -> tuple[int, ...]:
    """Log-normal lengths cut at `longest`: evenly spaced quantiles, in shuffled order.

    Quantiles rather than draws, so that the median and the share of padding do not hang on the seed.
    """
    quantiles = (np.arange(notes) + 0.5) / notes
    spread = np.array([NormalDist().inv_cdf(q) for q in quantiles])
    lengths = np.clip(np.rint(median * np.exp(sigma * spread)), 4, longest).astype(int)
    return tuple(int(n) for n in np.random.default_rng(SEED).permutation(lengths))


def dense(batch_size: int, length: int) -> Cell:
    return Cell(f"{batch_size}x{length}", (length,) * batch_size)


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        dense(1, 16),
        dense(1, 128),
        dense(1, 384),
        dense(8, 128),
        Cell("ragged32", ragged_lengths(32)),
    )
}


def parse_cell(name: str) -> Cell:
    """A named cell, `BxL` (dense) or `raggedN`."""
    if name in CELLS:
        return CELLS[name]
    if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
        return dense(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"ragged([1-9]\d*)", name):
        return Cell(name, ragged_lengths(int(found[1])))
    raise ValueError(f"cell {name!r} is none of {', '.join(CELLS)}, nor of the form 4x64 or ragged8")


def make_batch(cell: Cell, vocab_size: int) -> Batch:
    rng = np.random.default_rng(SEED)
    shape = (cell.batch_size, cell.padded_length)
    lengths = np.array(cell.lengths)
    attention_mask = (np.arange(cell.padded_length) < lengths[:, None]).astype(np.int64)
    input_ids = rng.integers(FIRST_WORD, vocab_size, shape) * attention_mask
    input_ids[:, 0] = CLS
    input_ids[np.arange(cell.batch_size), lengths - 1] = SEP
    return Batch(input_ids.astype(np.int64), attention_mask, np.zeros(shape, dtype=np.int64))
