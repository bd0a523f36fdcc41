"""Whether a few values in memory are still what they were: 800 scattered reads in one call."""

from __future__ import annotations

from collections.abc import Callable

from clinfast.backends.cpu import native

# (addresses, expected, count, width) -> bool; None without compiled kernels.
values_unchanged: Callable[[int, int, int, int], bool] | None = (
    native.kernels().values_unchanged if native.load_error() is None else None
)
