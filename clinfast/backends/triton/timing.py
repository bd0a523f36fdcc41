"""What `clinfast tune` times: single ops of given shapes and tiles, on the card at hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clinfast.backends.triton import attention
from clinfast.backends.triton.linear import GpuLinear
from clinfast.triton_kernels import configs

TOKENS, HEADS = 8192, 12
LENGTHS = {"long": 384, "short": 64, "few": 128}


def card(index: int) -> str:
    return torch.cuda.get_device_name(index)


def seconds(call: Callable[[], Any]) -> float:
    """Median of device times; the first call, which may compile, is not among them."""
    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        for _ in range(5):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 5e3)
    return sorted(times)[len(times) // 2]


@functools.cache
def _attention_inputs(head_dim: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    qkv = torch.randn(TOKENS, 3, HEADS, head_dim, device="cuda", dtype=torch.bfloat16)
    cu_seqlens_k = torch.arange(0, TOKENS + 1, LENGTHS[kind], dtype=torch.int32, device="cuda")
    notes = len(cu_seqlens_k) - 1
    cu_seqlens_q = torch.arange(notes + 1, dtype=torch.int32, device="cuda") if kind == "few" else cu_seqlens_k
    return qkv, cu_seqlens_q, cu_seqlens_k


def attend(head_dim: int, kind: str, tiles: dict[str, Any]) -> Tensor:
    """Attention of `kind` with these tiles, whatever the table says."""
    qkv, cu_seqlens_q, cu_seqlens_k = _attention_inputs(head_dim, kind)
    q, k, v = qkv.unbind(1)
    rows = int(cu_seqlens_k.shape[0] - 1) if kind == "few" else LENGTHS[kind] * (cu_seqlens_k.shape[0] - 1)
    keys = LENGTHS[kind] * (cu_seqlens_k.shape[0] - 1)
    return attention.extended(
        q[:rows], k[:keys], v[:keys], cu_seqlens_q, cu_seqlens_k, None, head_dim**-0.5,
        tiles=configs.Attention(**tiles),
    )  # fmt: skip


@functools.cache
def _linear(in_features: int, out_features: int) -> GpuLinear:
    weight = torch.randn(out_features, in_features, device="cuda") / in_features**0.5
    return GpuLinear(weight, torch.randn(out_features, device="cuda"), torch.bfloat16)


@functools.cache
def _rows(in_features: int, rows: int | None) -> Tensor:
    return torch.randn(rows or TOKENS, in_features, device="cuda", dtype=torch.bfloat16)


def multiply(in_features: int, out_features: int, rows: int | None, tiles: dict[str, Any]) -> Tensor:
    linear = _linear(in_features, out_features)
    return linear.product(_rows(in_features, rows), "gelu", None, configs.Linear(**tiles))


def library(in_features: int, out_features: int) -> Tensor:
    linear = _linear(in_features, out_features)
    product = torch.nn.functional.linear(_rows(in_features, None), linear.weight, linear.bias)
    return torch.nn.functional.gelu(product)
