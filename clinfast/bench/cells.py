"""The shapes a model is timed on, and the seeded inputs of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

CLS, SEP, FIRST_WORD = 101, 102, 1000
SEED = 20
LONGEST = 512


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
    """Model inputs as int64 arrays [batch, length]; padding is on the right. Token types are all 0."""

    input_ids: IntArray
    attention_mask: IntArray

    def of(self, inputs: Iterable[str]) -> dict[str, IntArray]:
        """By name, those that a model takes."""
        arrays = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "token_type_ids": np.zeros_like(self.input_ids),
        }
        return {name: arrays[name] for name in inputs}

    @property
    def lengths(self) -> IntArray:
        return self.attention_mask.sum(axis=1)


def ragged_lengths(
    notes: int, *, median: int = 120, sigma: float = 1.25, longest: int = LONGEST
) -> tuple[int, ...]:
    """Log-normal lengths cut at `longest`: evenly spaced quantiles, in shuffled order.

    Quantiles rather than draws, so that the median and the share of padding do not hang on the seed.
    """
    quantiles = (np.arange(notes) + 0.5) / notes
    spread = np.array([NormalDist().inv_cdf(q) for q in quantiles])
    lengths = np.clip(np.rint(median * np.exp(sigma * spread)), min(4, longest), longest).astype(int)
    return tuple(int(n) for n in np.random.default_rng(SEED).permutation(lengths))


def long_lengths(notes: int, shortest: int = 512, longest: int = 4096) -> tuple[int, ...]:
    """From `shortest` to `longest`, each the same factor longer than the one before, in shuffled order."""
    lengths = np.rint(np.geomspace(shortest, longest, notes)).astype(int)
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


def parse_cell(name: str, longest: int = LONGEST) -> Cell:
    """A named cell, `BxL` (dense), `raggedN`, whose lengths are cut at `longest`, or `longN`, 512 to 4,096 tokens."""
    if name in CELLS and longest >= LONGEST:
        return CELLS[name]
    if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
        return dense(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"ragged([1-9]\d*)", name):
        return Cell(name, ragged_lengths(int(found[1]), longest=min(longest, LONGEST)))
    if found := re.fullmatch(r"long([1-9]\d*)", name):
        return Cell(name, long_lengths(int(found[1])))
    raise ValueError(f"cell {name!r} is none of {', '.join(CELLS)}, nor of the form 4x64, ragged8 or long8")


def make_batch(cell: Cell, vocab_size: int, pad_id: int = 0) -> Batch:
    """Random ids in the cell's lengths; where the vocabulary is a small one, without BERT's own special ids."""
    rng = np.random.default_rng(SEED)
    shape = (cell.batch_size, cell.padded_length)
    lengths = np.array(cell.lengths)
    mask = np.arange(cell.padded_length) < lengths[:, None]
    first = FIRST_WORD if vocab_size > 2 * FIRST_WORD else min(pad_id + 1, vocab_size - 1)
    input_ids = np.where(mask, rng.integers(first, vocab_size, shape), pad_id)
    if first == FIRST_WORD:
        input_ids[:, 0] = CLS
        input_ids[np.arange(cell.batch_size), lengths - 1] = SEP
    return Batch(input_ids.astype(np.int64), mask.astype(np.int64))


def batch_of(notes: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """Token ids of notes, padded to the longest."""
    lengths = np.array([len(note) for note in notes])
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = np.concatenate([np.asarray(note, dtype=np.int64) for note in notes])
    return Batch(input_ids, mask.astype(np.int64))


def save_batch(batch: Batch, file: Path) -> None:
    np.savez(file, input_ids=batch.input_ids, attention_mask=batch.attention_mask)


def load_batch(file: Path) -> Batch:
    with np.load(file) as arrays:
        return Batch(arrays["input_ids"], arrays["attention_mask"])
