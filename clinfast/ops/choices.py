"""Which backend comes first for an op on an NVIDIA GPU: one table, whose rows say on what they rest.

The first row that names the op, the dtype and the card decides which backend is tried first; the others follow in the
order of `registry.BACKENDS`. A backend that is not there, or does not offer the op, is passed over.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

FULL, HALF = (torch.float32,), (torch.bfloat16, torch.float16)
ANY = FULL + HALF
OLDEST, NEWEST = (0, 0), (99, 9)


@dataclasses.dataclass(frozen=True)
class Choice:
    """`backend` first for `ops` in `dtypes` on compute capabilities `least` to `most`, because of `why`."""

    ops: tuple[str, ...]
    backend: str
    why: str
    dtypes: tuple[torch.dtype, ...] = ANY
    least: tuple[int, int] = OLDEST
    most: tuple[int, int] = NEWEST


# Nothing here was measured yet: every `why` is reasoning, with its figures in docs/decisions/0030-cuda-kernels.md. What
# `make gpu-check` finds replaces it.
TABLE: tuple[Choice, ...] = (
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
    Choice(("attention_biased",), "triton", "the CUDA kernels take no bias"),
    Choice(("attention_windowed",), "triton", "the CUDA kernels have no window"),
    Choice(("rotate", "gate"), "triton", "bound by memory; the CUDA kernels have neither"),
    Choice(("attention",), "cuda", "both are fp32 multiply-adds; ours is there without a compiler", FULL),
    Choice(
        ("pack", "position_ids", "unpack", "embedding", "layer_norm", "gelu", "pooling"), "cuda",
        "bound by memory or by launches in both; ours needs no compiler at the first request",
    ),
    Choice(
        ("linear", "linear.prepack"), "triton", "its product fuses the exact GELU where its table says so; ours leaves "
        "that to a second kernel",
    ),
)  # fmt: skip


def first(op: str, dtype: torch.dtype, capability: tuple[int, int]) -> Choice | None:
    """The row that decides."""
    return next(
        (c for c in TABLE if op in c.ops and dtype in c.dtypes and c.least <= capability <= c.most), None
    )


def ranked(op: str, names: list[str], dtype: torch.dtype, capability: tuple[int, int]) -> list[str]:
    """`names`, with the table's choice in front."""
    choice = first(op, dtype, capability)
    if choice is None or choice.backend not in names:
        return names
    return [choice.backend, *(name for name in names if name != choice.backend)]


@functools.cache
def capability() -> tuple[int, int]:
    """Of the current GPU; machines whose GPUs differ get the choices of one of them."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else OLDEST


def by_dtype(found: dict[torch.dtype, Callable[..., Any]]) -> Callable[..., Any]:
    """One function for all: the same one, or one that looks at the dtype of its first argument."""
    functions = list(found.values())
    if all(function is functions[0] for function in functions):
        return functions[0]

    @functools.wraps(functions[0])
    def call(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        return found.get(x.dtype, functions[0])(*args, **kwargs)

    return call
