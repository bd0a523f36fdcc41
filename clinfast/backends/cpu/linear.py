"""`linear` on weights that are laid out once: our own multiplication, or the oneDNN that torch carries."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from clinfast.backends.cpu import native
from clinfast.backends.torch import FallbackLinear, linear, scatter_in_blocks
from clinfast.ops.linear import ACTIVATIONS

# Activation -> oneDNN post-op and its algorithm, in the terms of torch's pointwise linear.
POST_OPS = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "tanh": ("tanh", ""),
    "silu": ("swish", ""),
}


class _Packed:
    __slots__ = ("bias", "dtype", "in_features", "nbytes", "out_features", "weight")

    library: str
    weight: Tensor
    bias: Tensor | None

    def _describe(self, plain: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.out_features, self.in_features = plain.shape
        self.nbytes = self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def _check(self, x: Tensor, activation: str, residual: Tensor | None) -> None:
        if x.dim() != 2 or x.shape[1] != self.in_features or x.dtype is not self.dtype or x.stride(1) != 1:
            raise ValueError(
                f"linear: x is {list(x.shape)} {x.dtype} with strides {x.stride()}; it must be [rows, "
                f"{self.in_features}] {self.dtype} with contiguous rows"
            )
        if residual is not None and (
            residual.shape != (x.shape[0], self.out_features)
            or residual.dtype is not self.dtype
            or residual.stride(1) != 1
        ):
            raise ValueError(
                f"linear: residual is {list(residual.shape)} {residual.dtype}; it must be "
                f"[{x.shape[0]}, {self.out_features}] {self.dtype} with contiguous rows"
            )
        if activation not in POST_OPS:
            raise ValueError(f"linear: activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")

    def scatter(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        scatter_in_blocks(self, x, rows, out)  # type: ignore[arg-type]


class NativeLinear(_Packed):
    """Our own multiplication (csrc/cpu/linear.cpp); a row's bits never depend on the rows beside it.

    With `gated`, the weight has two rows an output, and the result is activation(first half) * second half.
    """

    __slots__ = ("_code", "_table", "gated")

    library = "clinfast"

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, gated: bool = False) -> None:
        kernels, code = native.kernels(), native.DTYPES[dtype]
        plain = weight.detach().to(dtype)
        plain = plain if plain.stride(1) == 1 else plain.contiguous()
        rows, in_features = plain.shape
        if gated and rows % 2:
            raise ValueError(f"linear: the weight is {list(weight.shape)}; a gated one has two rows an output")
        out_features = rows // 2 if gated else rows
        self.gated = gated
        self._code, self._table = code, kernels.current_table()
        size = kernels.linear_packed_bytes(in_features, out_features, gated, code, self._table)
        self.weight = torch.empty(size, dtype=torch.uint8)
        kernels.linear_pack(
            plain.data_ptr(), plain.stride(0), in_features, out_features, gated, code, self.weight.data_ptr(),
            self._table, torch.get_num_threads(),
        )  # fmt: skip
        self.bias = None if bias is None else bias.detach().to(dtype).to(torch.float32, copy=True).contiguous()
        self._describe(plain, dtype)
        self.out_features = out_features

    def __call__(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        self._check(x, activation, residual)
        if self.gated and residual is not None:
            raise ValueError("linear: a gated product takes no residual")
        out = torch.empty((x.shape[0], self.out_features), dtype=self.dtype)
        self._multiply(x, activation, residual, out, None)
        return out

    def scatter(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        if out.dtype is not self.dtype:
            super().scatter(x, rows, out)
            return
        self._check(x, "none", None)
        if out.ndim != 2 or out.shape[1] != self.out_features or not out.is_contiguous():
            raise ValueError(
                f"linear: out is {list(out.shape)} with strides {out.stride()}; it must be contiguous rows of "
                f"{self.out_features}"
            )
        native.check_vector("linear", "rows", rows, x.shape[0], torch.int32)
        self._multiply(x, "none", None, out, rows)

    def _multiply(
        self, x: Tensor, activation: str, residual: Tensor | None, out: Tensor, out_rows: Tensor | None
    ) -> None:
        outputs = self.out_features
        native.kernels().linear(
            x.data_ptr(), self.weight.data_ptr(), native.address(self.bias), native.address(residual),
            out.data_ptr(), native.address(out_rows), out.shape[0], x.stride(0),
            0 if residual is None else residual.stride(0), outputs, x.shape[0], self.in_features, outputs,
            ACTIVATIONS.index(activation), self.gated, self._code, self._table, torch.get_num_threads(),
        )  # fmt: skip


class OneDnnLinear(_Packed):
    """torch's prepacked linear, as Inductor uses it."""

    __slots__ = ()

    library = "oneDNN"

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        plain = weight.detach().to(dtype).contiguous()
        # The layout is the same for every row count but 1, whose own layout is three times slower at 2 rows.
        self.weight = torch.ops.mkldnn._reorder_linear_weight.default(plain, 128)
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self._describe(plain, dtype)

    def __call__(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        self._check(x, activation, residual)
        if x.shape[0] == 1:
            # A lone row takes a kernel of its own that sums in another order from 1,536 inputs on.
            twice = None if residual is None else residual.expand(2, -1).contiguous()
            return self(x.expand(2, -1).contiguous(), activation, twice)[:1]
        if residual is None:
            post_op, algorithm = POST_OPS[activation]
            return torch.ops.mkldnn._linear_pointwise.default(
                x, self.weight, self.bias, post_op, [], algorithm
            )
        if activation != "none":
            return self(x, activation) + residual
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")

    def _describe(self, plain: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.out_features, self.in_features = plain.shape
        self.nbytes = plain.nbytes + (0 if self.bias is None else self.bias.nbytes)


@functools.cache
def onednn_serves(dtype: torch.dtype) -> bool:
    """Whether this torch and processor run the prepacked linear: tried, not guessed from versions."""
    try:
        with torch.no_grad():
            weight = torch.eye(32, dtype=dtype)
            packed = OneDnnLinear(weight, torch.zeros(32, dtype=dtype), dtype)
            x = torch.arange(64, dtype=dtype).view(2, 32)
            return torch.equal(packed(x), x) and torch.equal(packed(x, residual=x), x + x)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def ours_is_faster(dtype: torch.dtype) -> bool:
    """Where our multiplication measured at least as fast as oneDNN: AVX-512, and bf16 with AMX, or without it but with
    AVX-512's own dot product. See docs/decisions/0002-own-gemm-on-avx512.md and 0010-amx.md."""
    isa = native.isa()
    if dtype is torch.bfloat16 and isa == "avx512_bf16":
        # An instruction set that was asked for, or a build without AMX, on a processor where oneDNN has it.
        return not getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return isa == "amx" or (dtype is torch.float32 and isa in ("avx512", "avx512_bf16"))


def library(dtype: torch.dtype) -> type[NativeLinear] | type[OneDnnLinear] | type[FallbackLinear]:
    """What multiplies in `dtype`; the environment variable CLINFAST_CPU_LINEAR (clinfast, onednn, torch) overrides."""
    known: dict[str, type[NativeLinear] | type[OneDnnLinear] | type[FallbackLinear]]
    known = {"clinfast": NativeLinear, "onednn": OneDnnLinear, "torch": FallbackLinear}
    asked = os.environ.get("CLINFAST_CPU_LINEAR", "")
    if asked:
        if asked not in known:
            raise ValueError(f"CLINFAST_CPU_LINEAR is {asked!r}; choose one of {', '.join(known)}")
        return known[asked]
    if ours_is_faster(dtype):
        return NativeLinear
    return OneDnnLinear if onednn_serves(dtype) else NativeLinear


def prepack(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> NativeLinear | OneDnnLinear | FallbackLinear:
    return library(dtype)(weight, bias, dtype)


def prepack_gated(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> NativeLinear | None:
    """None where another library multiplies, which cannot end in a gate."""
    return NativeLinear(weight, bias, dtype, gated=True) if library(dtype) is NativeLinear else None


IMPLEMENTATIONS = {"linear": linear, "linear.prepack": prepack, "linear.prepack_gated": prepack_gated}
