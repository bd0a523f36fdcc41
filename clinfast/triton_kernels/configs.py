"""Tile shapes by device class and shape: JSON tables in `tables/`, or one that `clinfast tune` made for a card.

A table holds, by op and shape, what a kernel is compiled with. Shapes that it does not list take its `default`,
announced once; the environment variable CLINFAST_TUNING_TABLE names a file that is read instead.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

TABLES = Path(__file__).parent / "tables"
CLASSES = (80, 89, 90, 100, 120)
log = logging.getLogger("clinfast")


class Attention(NamedTuple):
    """`registers`, here and below: the most that a thread may take; 0 leaves it to the assembler, which may spill a few
    bytes to fit one more program on a multiprocessor."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int = 0


class Linear(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    tma: bool
    registers: int = 0


class Rows(NamedTuple):
    """Of the kernels that take whole rows: rows a program."""

    rows: int
    num_warps: int


def device_class(capability: tuple[int, int]) -> int:
    """The newest class that is not newer than the card; 8.6 is Ampere's, 10.3 and 12.1 are their majors'."""
    number = capability[0] * 10 + capability[1]
    return max((c for c in CLASSES if c <= number), default=CLASSES[0])


@functools.cache
def table(of_class: int) -> dict[str, Any]:
    """The table in force for a device class.

    Raises:
        ValueError: CLINFAST_TUNING_TABLE names a file that is not a table.
    """
    path = os.environ.get("CLINFAST_TUNING_TABLE")
    if path:
        own = read(Path(path))
        if own["device_class"] == of_class:
            return own
        log.warning("clinfast: %s was made for class %s, not %s: not used", path, own["device_class"], of_class)
    return read(TABLES / f"sm_{of_class}.json")


def read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        assert {"device_class", "attention", "linear", "rows"} <= found.keys()
    except (OSError, ValueError, AssertionError, AttributeError) as error:
        raise ValueError(f"{path} is not a tuning table of clinfast: {error or 'keys are missing'}") from error
    return found


@functools.cache
def announce_default(of_class: int, op: str, shape: str) -> None:
    log.info("clinfast: no tuned tiles for %s of %s on class %d: the default serves", op, shape, of_class)


def _of_shape(of_class: int, op: str, shape: str) -> Any:
    entries = table(of_class)[op]
    if shape not in entries:
        announce_default(of_class, op, shape)
    return entries.get(shape, entries["default"])


@functools.cache
def attention(of_class: int, itemsize: int, head_dim: int, kind: str) -> Attention:
    """`kind`: `"long"`, `"short"` (a note is one tile of keys), `"few"` (a query or two a note), or `"biased"` (a bias
    or a window), which the table may leave to `"long"`."""
    width = next(block for block in (16, 32, 64, 128, 256) if head_dim <= block)
    entry = _of_shape(of_class, "attention", f"{8 * itemsize} bit, head_dim {width}")
    return Attention(**(entry["long"] if kind == "biased" and kind not in entry else entry[kind]))


def biased(tiles: Attention, itemsize: int, head_dim: int) -> Attention:
    """`tiles` as attention with a bias takes them: its places and values need registers, which wide heads lack."""
    if head_dim <= 64:
        return tiles
    if itemsize == 4:
        return tiles._replace(num_warps=8, registers=0)
    warps = 8 if tiles.block_m >= 128 else tiles.num_warps
    return tiles._replace(block_n=min(tiles.block_n, 32), num_warps=warps, registers=0)


def disentangled(itemsize: int, head_dim: int) -> tuple[Attention, int]:
    """Tiles of attention with DeBERTa's terms, and table rows a turn, which hold all distances of a tile."""
    # The largest that spill no registers; tiles of 64 x 64 spill 32 to 160 bytes a thread.
    if itemsize == 2 and head_dim <= 128:
        return Attention(32, 32, 4 if head_dim <= 64 else 8, 1), 64
    return Attention(16, 16, 4 if head_dim <= 64 else 8, 1), 32


@functools.cache
def linear(of_class: int, itemsize: int, in_features: int, out_features: int, rows: int) -> Linear:
    """`rows`: how many rows there are, rounded up to a power of two by the caller."""
    if itemsize == 4:
        return Linear(**table(of_class)["linear"]["32 bit"])
    entries = _of_shape(of_class, "linear", f"{in_features} x {out_features}")
    return Linear(**next(e["tiles"] for e in entries["tiles"] if e["max_rows"] is None or rows <= e["max_rows"]))


@functools.cache
def fuses(of_class: int, itemsize: int, in_features: int, out_features: int, activation: str) -> bool:
    """Whether our product with the activation fused is taken for faster than the library's and a second pass."""
    if itemsize == 4:
        return False
    entries = table(of_class)["linear"]
    return activation in entries.get(f"{in_features} x {out_features}", entries["default"])["fused"]


@functools.cache
def rows(of_class: int, width: int) -> Rows:
    """`width`: the power of two that holds a row."""
    entries = table(of_class)["rows"]
    return Rows(**entries.get(str(width), entries["default"]))
