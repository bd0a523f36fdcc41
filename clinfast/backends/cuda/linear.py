"""`linear` on a GPU: the library of torch multiplies, and our kernel adds the bias and applies GELU in one pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clinfast.backends.cuda.gelu import gelu
from clinfast.backends.torch import linear, scatter_in_blocks
from clinfast.ops.linear import ACTIVATIONS, activate

GELUS = {"gelu": "none", "gelu_tanh": "tanh"}


class LibraryLinear:
    """A copy of the weight for cuBLASLt. With GELU, the bias is left to the GELU's kernel, in fp32."""

    __slots__ = ("_bias32", "bias", "dtype", "in_features", "library", "nbytes", "out_features", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self._bias32 = None if self.bias is None else self.bias.float()
        self.nbytes = sum(t.nbytes for t in (self.weight, self.bias, self._bias32) if t is not None)
        self.library, self.dtype = "cuBLAS", dtype
        self.out_features, self.in_features = self.weight.shape

    def __call__(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.in_features or x.dtype is not self.dtype:
            raise ValueError(
                f"linear: x is {list(x.shape)} {x.dtype}; it must be [rows, {self.in_features}] {self.dtype}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"linear: activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        approximate = GELUS.get(activation)
        if approximate is not None:
            y = gelu(functional.linear(x, self.weight), self._bias32, approximate)
        else:
            y = activate(functional.linear(x, self.weight, self.bias), activation)
        return y if residual is None else y + residual

    def scatter(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        scatter_in_blocks(self, x, rows, out)


IMPLEMENTATIONS = {"linear": linear, "linear.prepack": LibraryLinear}
