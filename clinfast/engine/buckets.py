"""Which sizes graphs are captured for: a batch runs in the smallest that holds it."""

from __future__ import annotations

from typing import NamedTuple

# Above so many rows the device works longer than the host needs to launch op by op.
MAX_ROWS, MAX_NOTES = 8192, 256
LEAST_ROWS = 16


class Bucket(NamedTuple):
    """Packed rows and notes that a graph has room for."""

    rows: int
    notes: int


def rows_for(tokens: int) -> int:
    """Eight sizes to a doubling, in steps of 16 and more: less than an eighth is computed in vain."""
    step = max(LEAST_ROWS, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


def bucket(tokens: int, batch: int) -> Bucket | None:
    """None for a batch beyond the largest."""
    if tokens > MAX_ROWS or batch > MAX_NOTES:
        return None
    return Bucket(rows_for(max(1, tokens)), 1 << (batch - 1).bit_length())
