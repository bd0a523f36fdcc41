"""`linear` on a GPU: our product where something is fused behind it, the library of torch elsewhere."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from clinfast.backends.torch import linear, scatter_in_blocks
from clinfast.backends.triton import checks, device
from clinfast.backends.triton.launch import KernelUnavailable, Matrix, launch
from clinfast.ops.linear import ACTIVATIONS
from clinfast.ops.registry import substitute
from clinfast.triton_kernels import configs

# The rows whose tiles `FixedLinear` takes.
FIXED_ROWS = 1024
CHOICES = ("", "clinfast", "torch")


class GpuLinear:
    """A copy of the weight as it was, [out_features, in_features], which both products take.

    Whether a call runs on our product is the tuning table's word for its shape and activation; the environment variable
    CLINFAST_GPU_LINEAR (clinfast, torch) overrides it.
    """

    __slots__ = (
        "_bias32", "_index", "_stock", "bias", "dtype", "in_features", "library", "nbytes", "out_features", "weight",
    )  # fmt: skip

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self._bias32 = None if self.bias is None else self.bias.float()
        held = [t for t in (self.weight, self.bias, self._bias32) if t is not None]
        self.nbytes = sum(t.nbytes for t in held)
        self.dtype, self._index = dtype, device.index_of(self.weight)
        self.out_features, self.in_features = self.weight.shape
        self.library = "Triton, cuBLAS" if any(map(self._is_ours, ACTIVATIONS)) else "cuBLAS"
        self._stock = False

    def __call__(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        self._check(x, activation, residual)
        if x.shape[0] and not self._stock and self._is_ours(activation):
            try:
                return self.product(x, activation, residual)
            except KernelUnavailable as reason:
                self._stock, self.library = True, "cuBLAS"
                substitute("linear", "torch", str(reason))
        return linear(x, self.weight, self.bias, activation, residual)

    def scatter(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        scatter_in_blocks(self, x, rows, out)

    def product(
        self, x: Tensor, activation: str, residual: Tensor | None, tiles: configs.Linear | None = None
    ) -> Tensor:
        """Our own, whatever the table says.

        Raises:
            KernelUnavailable: there is no kernel for it here.
        """
        m, n, k = x.shape[0], self.out_features, self.in_features
        if tiles is None:
            of_class = device.device_class(self._index)
            tiles = configs.linear(of_class, self.dtype.itemsize, k, n, checks.power_of_two(m))
        out = torch.empty((m, n), dtype=self.dtype, device=x.device)
        count = checks.cdiv(m, tiles.block_m) * checks.cdiv(n, tiles.block_n)
        grid = (min(count, device.multiprocessors(self._index) * programs(tiles)), 1, 1)
        residual_row = 0 if residual is None else residual.stride(0)
        constants = (activation, tiles.block_m, tiles.block_n, tiles.block_k, tiles.group_m)
        if tiles.tma and all(map(_suits_tma, (x, self.weight, out))):
            launch(
                "linear_tma_kernel", grid,
                (Matrix(x, (tiles.block_m, tiles.block_k)), Matrix(self.weight, (tiles.block_n, tiles.block_k)),
                 self._bias32, residual, Matrix(out, (tiles.block_m, tiles.block_n)), m, n, k, residual_row),
                (*constants, "ieee"), tiles.num_warps, tiles.num_stages, tiles.registers,
            )  # fmt: skip
        else:
            launch(
                "linear_kernel", grid,
                (x, self.weight, self._bias32, residual, out, m, n, k, x.stride(0), self.weight.stride(0), residual_row,
                 n),
                (*constants, k % tiles.block_k == 0, "ieee"), tiles.num_warps, tiles.num_stages, tiles.registers,
            )  # fmt: skip
        return out

    def _is_ours(self, activation: str) -> bool:
        asked = os.environ.get("CLINFAST_GPU_LINEAR", "")
        if asked not in CHOICES:
            raise ValueError(f"CLINFAST_GPU_LINEAR is {asked!r}; choose clinfast or torch")
        if asked:
            return asked == "clinfast"
        return configs.fuses(
            device.device_class(self._index), self.dtype.itemsize, self.in_features, self.out_features, activation
        )

    def _check(self, x: Tensor, activation: str, residual: Tensor | None) -> None:
        if x.dim() != 2 or x.shape[1] != self.in_features or x.dtype is not self.dtype or x.stride(1) != 1:
            raise ValueError(
                f"linear: x is {list(x.shape)} {x.dtype} with strides {x.stride()}; it must be [rows, "
                f"{self.in_features}] {self.dtype} with contiguous rows"
            )
        if x.device != self.weight.device:
            raise ValueError(f"linear: x is on {x.device}; the weight is on {self.weight.device}")
        if residual is not None and (
            residual.shape != (x.shape[0], self.out_features)
            or residual.dtype is not self.dtype
            or residual.stride(1) != 1
        ):
            raise ValueError(
                f"linear: residual is {list(residual.shape)} {residual.dtype}; it must be "
                f"[{x.shape[0]}, {self.out_features}] {self.dtype} with contiguous rows"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"linear: activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")


class FixedLinear(GpuLinear):
    """Our product in the same tiles at every number of rows, and never split along K: the library chooses by shape, so
    that a row's bits depend on the rows beside it."""

    __slots__ = ()

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        self.library = "Triton, fixed tiles"

    def __call__(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        self._check(x, activation, residual)
        if not x.shape[0]:
            return torch.empty((0, self.out_features), dtype=self.dtype, device=x.device)
        of_class = device.device_class(self._index)
        tiles = configs.linear(of_class, self.dtype.itemsize, self.in_features, self.out_features, FIXED_ROWS)
        try:
            return self.product(x, activation, residual, tiles)
        except KernelUnavailable as reason:
            raise NotImplementedError(f"reproducible=True needs a product of fixed tiles: {reason}") from None


def programs(tiles: configs.Linear) -> int:
    """Programs that one multiprocessor holds at once, by their shared memory: one of eight warps and its stages, or two
    smaller ones."""
    return 1 if tiles.num_warps >= 8 and tiles.tma else 2


def _suits_tma(matrix: Tensor) -> bool:
    """The copy engine takes starts and rows that 16 bytes divide."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.itemsize % 16 == 0 and matrix.stride(1) == 1


IMPLEMENTATIONS = {"linear": linear, "linear.prepack": GpuLinear, "linear.prepack_fixed": FixedLinear}
