"""The measurements of `clinfast verify`: errors by combination, and bits by batch composition."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clinfast import patch
from clinfast.cli.notes import Notes
from clinfast.cli.sides import PADDINGS, Inputs, Outputs, Precision, Sides, stock_calls
from clinfast.verify import Tally

# Notes of a bucket that also run padded to the model's longest: stock computes all of that.
PADDED_NOTES = 32
LONGEST = "longest"
SEED = 0

Advance = Callable[[str, int], None]


@dataclass
class Row:
    """One combination. `padded_to` is "longest" (of the batch) or a number of tokens."""

    precision: str
    padding: str
    padded_to: str
    tokens: str
    notes: int = 0
    tally: Tally = field(default_factory=Tally)
    stock_calls: Counter[str] = field(default_factory=Counter)
    passed: bool = False


@dataclass
class Composition:
    """How many notes have the bits that they have in sorted batches; `promised`: they all must."""

    precision: str
    batches: str
    notes: int
    same: int
    promised: bool

    @property
    def passed(self) -> bool:
        return self.same == self.notes or not self.promised


def batched(notes: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(notes), size):
        yield notes[first : first + size]


class Measurement:
    """Runs everything; `rows` and `compositions` are the result.

    Args:
        advance: told a precision or step, and the padded tokens that were computed.
    """

    def __init__(self, sides: Sides, notes: Notes, batch_size: int, advance: Advance) -> None:
        self.sides, self.notes, self.size, self.advance = sides, notes, batch_size, advance
        self.rows: list[Row] = []
        self.compositions: list[Composition] = []
        self._bits: dict[tuple[str, str], dict[int, bytes]] = {}
        patched = [unit for _, _, unit in patch.find_patched(sides.precisions[0].optimized["remove"])]
        self.per_token = patched[0].match.per_token if len(patched) == 1 else None
        self._is_per_token = Tally(self.per_token).is_per_token

    def work(self) -> int:
        """Padded tokens to compute, as `advance` will be told them."""
        tokens = 0
        for _, bucket in self.notes.buckets():
            for index, batch in enumerate(batched(bucket, self.size)):
                tokens += self._cost(batch)
                for padded_to in self._layouts(index):
                    cost = len(batch) * self.notes.longest if padded_to != LONGEST else self._cost(batch)
                    tokens += cost * len(self.sides.precisions) * (1 + len(PADDINGS))
        alone = sum(self.notes.length(note) for note in range(len(self.notes)))
        mixed = sum(self._cost(batch) for batch in self._shuffled())
        return tokens + (alone + mixed) * len(self.sides.precisions)

    def run(self, threshold: float | None) -> None:
        for tokens, bucket in self.notes.buckets():
            self._bucket(tokens, bucket)
        self.rows.sort(key=lambda row: [precision.name for precision in self.sides.precisions].index(row.precision))
        for precision in self.sides.precisions:
            self._judge(precision, threshold)
            self._compose(precision)

    def _judge(self, precision: Precision, threshold: float | None) -> None:
        rows = [row for row in self.rows if row.precision == precision.name]
        # Over all notes: the largest error of a few is a matter of luck, stock's as much as ours.
        stock_error = max(row.tally.stock_error for row in rows)
        for row in rows:
            row.passed = not row.stock_calls and row.tally.passed(threshold, precision.eps, stock_error)

    def _layouts(self, index: int) -> list[str]:
        """How the index-th batch of a bucket is padded."""
        return [LONGEST] + [str(self.notes.longest)] * (index * self.size < PADDED_NOTES)

    def _cost(self, batch: Sequence[int]) -> int:
        return len(batch) * max(self.notes.length(note) for note in batch)

    def _bucket(self, tokens: str, bucket: list[int]) -> None:
        rows: dict[tuple[str, str, str], Row] = {}
        for index, batch in enumerate(batched(bucket, self.size)):
            inputs = self.notes.padded(batch)
            exact = self.sides.run(self.sides.exact, inputs)
            self.advance("float64", self._cost(batch))
            for padded_to in self._layouts(index):
                given = inputs if padded_to == LONGEST else self.notes.padded(batch, self.notes.longest)
                stock = self._narrow(self.sides.run(self.sides.stock, given), inputs, given)
                for precision in self.sides.precisions:
                    measure = stock
                    if precision.measure is not None:
                        measure = self._narrow(self.sides.run(precision.measure, given), inputs, given)
                    self.advance(f"stock {precision.name}", given["input_ids"].numel())
                    for padding in PADDINGS:
                        key = (precision.name, padding, padded_to)
                        row = rows.setdefault(key, Row(*key, tokens, tally=Tally(self.per_token)))
                        self._combination(precision, row, batch, (inputs, given), stock, measure, exact)
        self.rows += sorted(rows.values(), key=lambda row: (row.padding != "remove", row.padded_to != LONGEST))

    def _combination(
        self, precision: Precision, row: Row, batch: Sequence[int], inputs: tuple[Inputs, Inputs],
        stock: Outputs, measure: Outputs, exact: Outputs,
    ) -> None:  # fmt: skip
        real, given = inputs
        model = precision.optimized[row.padding]
        before = stock_calls(model)
        ours = self._narrow(self.sides.run(model, given), real, given)
        row.stock_calls += Counter(stock_calls(model)) - Counter(before)
        row.tally.add_batch(ours, stock, measure, exact, real["attention_mask"])
        row.notes += len(batch)
        if row.padding == "remove":
            kind = "sorted by length" if row.padded_to == LONGEST else f"padded to {row.padded_to}"
            self._remember(precision, kind, batch, ours, real["attention_mask"])
        self.advance(f"clinfast {precision.name}", given["input_ids"].numel())

    def _compose(self, precision: Precision) -> None:
        model = precision.optimized["remove"]
        everyone = range(len(self.notes))
        for kind, batches in (("alone", [[note] for note in everyone]), ("shuffled", self._shuffled())):
            for batch in batches:
                inputs = self.notes.padded(batch)
                outputs = self.sides.run(model, inputs)
                self._remember(precision, kind, batch, outputs, inputs["attention_mask"])
                self.advance(f"{kind} {precision.name}", self._cost(batch))
        expected = self._bits[precision.name, "sorted by length"]
        for (name, kind), found in self._bits.items():
            if name == precision.name and found is not expected:
                same = sum(bits == expected[note] for note, bits in found.items())
                self.compositions.append(Composition(name, kind, len(found), same, precision.same_bits))

    def _shuffled(self) -> list[Sequence[int]]:
        order = list(range(len(self.notes)))
        random.Random(SEED).shuffle(order)
        return list(batched(order, self.size))

    def _narrow(self, outputs: Outputs, real: Inputs, given: Inputs) -> Outputs:
        """Outputs of a batch that was padded further, cut to the width of the real one."""
        width, wide = (inputs["input_ids"].shape for inputs in (real, given))
        return {
            name: value[:, : width[1]] if self._is_per_token(name, value, wide) else value
            for name, value in outputs.items()
        }

    def _remember(
        self, precision: Precision, kind: str, batch: Sequence[int], outputs: Outputs, mask: Tensor
    ) -> None:
        bits = self._bits.setdefault((precision.name, kind), {})
        for row, note in enumerate(batch):
            digest = hashlib.blake2b(digest_size=16)
            for name, value in outputs.items():
                length = self.notes.length(note) if self._is_per_token(name, value, mask.shape) else None
                mine = value[row] if length is None else value[row, :length]
                digest.update(mine.contiguous().view(torch.uint8).numpy().tobytes())
            bits[note] = digest.digest()
