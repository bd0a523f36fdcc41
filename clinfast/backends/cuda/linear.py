"""`linear` on a GPU: the library of torch multiplies, and our kernel adds the bias and applies GELU in one pass.
CLINFAST_CUDA_LINEAR=wgmma on Hopper, and =mma on 8.0 to 8.9, has a product of our own do all of it; off until a GPU has
shown them right and faster."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor
from torch.nn import functional

from clinfast.backends.cuda import native
from clinfast.backends.cuda.gelu import gelu
from clinfast.backends.torch import linear, scatter_in_blocks
from clinfast.ops.linear import ACTIVATIONS, activate

# Our products, by the compute capabilities that they are for.
PRODUCTS: dict[str, tuple[tuple[int, int], ...]] = {
    "library": (), "wgmma": ((9, 0),), "mma": ((8, 0), (8, 6), (8, 7), (8, 9)),
}  # fmt: skip
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


class OwnLinear(LibraryLinear):
    """Our product with bias and exact GELU, or on Hopper bias and residual, behind it; the library for the rest."""

    __slots__ = ()

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        if self._serves():
            self.library = "CUTLASS, cuBLAS"

    def _serves(self) -> bool:
        return self.dtype is not torch.float32 and self.in_features % 8 == 0 == self.out_features % 8

    def __call__(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        fused = (activation == "gelu") != (activation == "none" and residual is not None)
        if self._serves() and fused and x.dim() == 2 and x.dtype is self.dtype and x.shape[1] == self.in_features:
            out = self.product(x, activation == "gelu", residual if activation == "none" else None)
            if out is not None:
                return out if activation == "none" or residual is None else out + residual
        return super().__call__(x, activation, residual)

    def product(self, x: Tensor, with_gelu: bool, residual: Tensor | None) -> Tensor | None:
        """None where there is no kernel for it."""
        out = torch.empty(x.shape[0], self.out_features, dtype=x.dtype, device=x.device)
        held = [x] if residual is None else [x, residual]
        if any(t.stride(1) != 1 or t.stride(0) % 8 or t.data_ptr() % 16 for t in held) or not x.shape[0]:
            return None
        device = x.get_device()
        served = native.on(device).linear(
            x.data_ptr(), self.weight.data_ptr(), native.address(self._bias32), native.address(residual),
            native.address(self.bias), out.data_ptr(), x.stride(0), self.in_features,
            0 if residual is None else residual.stride(0), self.out_features, x.shape[0], self.in_features,
            self.out_features, with_gelu, native.DTYPES[self.dtype], native.multiprocessors(device), device,
            native.stream(device),
        )  # fmt: skip
        return out if served else None


@functools.cache
def product() -> str:
    asked = os.environ.get("CLINFAST_CUDA_LINEAR", "") or "library"
    if asked not in PRODUCTS:
        raise ValueError(f"CLINFAST_CUDA_LINEAR is {asked!r}; choose one of {', '.join(PRODUCTS)}")
    return asked


def prepack(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> LibraryLinear:
    served = PRODUCTS[product()]
    if served and native.capability(weight.get_device()) in served:
        return OwnLinear(weight, bias, dtype)
    return LibraryLinear(weight, bias, dtype)


IMPLEMENTATIONS = {"linear": linear, "linear.prepack": prepack}
