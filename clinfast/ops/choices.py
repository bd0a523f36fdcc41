"""Which backend comes first for an op on an NVIDIA GPU: one table, whose rows say on what they rest.

The first row that names the op, the dtype, the card and the size decides which backend is tried first; the others
follow in the order of `registry.BACKENDS`. A backend that is not there, or does not offer the op, is passed over. Rows
that `clinfast tune` measured on this card (in the file that CLINFAST_TUNING_TABLE names) come before reasoned ones.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clinfast.triton_kernels import configs

FULL, HALF = (torch.float32,), (torch.bfloat16, torch.float16)
ANY = FULL + HALF
OLDEST, NEWEST = (0, 0), (99, 9)
# Up to so many tokens a call is one request; above, a batch. Rows of the table may be for one or the other.
REQUEST_ROWS = 1024
log = logging.getLogger("clinfast")


@dataclasses.dataclass(frozen=True)
class Choice:
    """`backend` first for `ops` in `dtypes` on compute capabilities `least` to `most`, because of `why`; for calls of
    at most `max_rows` tokens, where that is given."""

    ops: tuple[str, ...]
    backend: str
    why: str
    dtypes: tuple[torch.dtype, ...] = ANY
    least: tuple[int, int] = OLDEST
    most: tuple[int, int] = NEWEST
    max_rows: int | None = None


# Nothing here was measured yet: every `why` is reasoning, with its figures in docs/decisions/0030-cuda-kernels.md.
# `clinfast tune` measures them on the card at hand; `make gpu-check` does so too.
TABLE: tuple[Choice, ...] = (
    Choice(
        ("attention.first_token",), "cuda", "one query a note fills no tile of a product: ours reads each key once, a "
        "note's keys split over warps",
    ),
    Choice(
        ("attention",), "cuda", "no tensor cores: Triton's dot is scalar code in registers and stack on 7.5",
        HALF, most=(7, 5),
    ),
    Choice(
        ("attention",), "triton", "wgmma by Triton against mma.sync of ours, at most 62% of its rate; our wgmma kernel "
        "is off until a GPU has shown it right", HALF, (9, 0), (9, 0),
    ),
    Choice(("attention",), "triton", "tcgen05 by Triton against mma.sync of ours", HALF, (10, 0), (11, 0)),
    Choice(
        ("attention",), "cuda", "both use mma.sync; ours takes a note of 128 keys in one pass and needs no table of "
        "tiles", HALF,
    ),
    Choice(("attention_biased", "attention_disentangled"), "triton", "the CUDA kernels add nothing to the scores"),
    Choice(("attention_windowed",), "triton", "the CUDA kernels have no window"),
    Choice(("rotate", "gate"), "triton", "bound by memory; the CUDA kernels have neither"),
    Choice(("attention",), "cuda", "both are fp32 multiply-adds; ours is there without a compiler", FULL),
    Choice(
        ("pack", "pack.into", "position_ids", "unpack", "embedding", "layer_norm", "gelu", "pooling"), "cuda",
        "bound by memory or by launches in both; ours needs no compiler at the first request",
    ),
    Choice(
        ("linear", "linear.prepack"), "triton", "its product fuses the exact GELU where its table says so; ours leaves "
        "that to a second kernel",
    ),
)  # fmt: skip


@functools.cache
def measured() -> dict[str, Any]:
    """What `clinfast tune` found on this very card, or nothing: `"backends"`, a list of `measured_row`s, and
    `"programmatic_launch"`."""
    path = os.environ.get("CLINFAST_TUNING_TABLE")
    if not path:
        return {}
    table = configs.read(Path(path))
    if "backends" not in table:  # tiles alone
        return {}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
    if table.get("card") != card:
        log.warning("clinfast: %s was measured on %s, not %s: its backends are not used", path, table.get("card"), card)
        return {}
    return table


def measured_row(
    op: str, dtype: torch.dtype, max_rows: int | None, times: dict[str, float], best: str
) -> dict[str, Any]:
    """One row as it stands in the file; `times` in microseconds."""
    return {
        "op": op, "dtype": str(dtype).removeprefix("torch."), "max_rows": max_rows, "backend": best,
        "microseconds": {name: round(value, 3) for name, value in times.items()},
    }  # fmt: skip


@functools.cache
def measured_choices() -> tuple[Choice, ...]:
    """
    Raises:
        ValueError: a row of the file is not one that `clinfast tune` writes.
    """
    found = []
    for row in measured().get("backends", ()):
        try:
            times = ", ".join(f"{name} {value} us" for name, value in row["microseconds"].items())
            why, dtypes = f"measured on {measured()['card']}: {times}", (getattr(torch, row["dtype"]),)
            found.append(Choice((row["op"],), row["backend"], why, dtypes, max_rows=row["max_rows"]))
        except (KeyError, AttributeError, TypeError) as error:
            path = os.environ["CLINFAST_TUNING_TABLE"]
            raise ValueError(f"{path} is not a tuning table of clinfast: its backends have the row {row}") from error
    # A row for requests before the one for all other calls.
    return tuple(sorted(found, key=lambda choice: choice.max_rows is None))


def first(op: str, dtype: torch.dtype, capability: tuple[int, int], rows: int | None = None) -> Choice | None:
    """The row that decides for calls of `rows` tokens; None means more than any row's bound."""
    return next(
        (
            c
            for c in (*measured_choices(), *TABLE)
            if op in c.ops
            and dtype in c.dtypes
            and c.least <= capability <= c.most
            and (c.max_rows is None or (rows is not None and rows <= c.max_rows))
        ),
        None,
    )


def ranked(
    op: str, names: list[str], dtype: torch.dtype, capability: tuple[int, int], rows: int | None = None
) -> list[str]:
    """`names`, with the table's choice in front."""
    choice = first(op, dtype, capability, rows)
    if choice is None or choice.backend not in names:
        return names
    return [choice.backend, *(name for name in names if name != choice.backend)]


@functools.cache
def capability() -> tuple[int, int]:
    """Of the current GPU; machines whose GPUs differ get the choices of one of them."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else OLDEST


def by_call(found: dict[tuple[torch.dtype, bool], Callable[..., Any]]) -> Callable[..., Any]:
    """One function for all: the same one, or one that looks at the dtype and the tokens of its arguments. Keys are of
    dtypes and whether the call is of at most `REQUEST_ROWS` tokens."""
    functions = list(found.values())
    if all(function is functions[0] for function in functions):
        return functions[0]

    @functools.wraps(functions[0])
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        rows = tensors[0].shape[0] if tensors[0].is_floating_point() else tensors[0].numel()
        # Of ids and their tables, the tables' decides; what is of integers alone counts as fp32.
        dtype = next((x.dtype for x in tensors if x.is_floating_point()), torch.float32)
        return found.get((dtype, rows <= REQUEST_ROWS), functions[0])(*args, **kwargs)

    return call
