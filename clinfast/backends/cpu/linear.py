"""`linear` through the oneDNN that torch carries, on weights that are laid out once."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from clinfast.backends.torch import FallbackLinear, linear

# Activation -> oneDNN post-op and its algorithm, in the terms of torch's pointwise linear.
POST_OPS = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "tanh": ("tanh", ""),
}


class OneDnnLinear:
    __slots__ = ("bias", "dtype", "in_features", "library", "nbytes", "out_features", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        plain = weight.detach().to(dtype).contiguous()
        # The layout is the same for every row count but 1, whose own layout is three times slower at 2 rows.
        self.weight = torch.ops.mkldnn._reorder_linear_weight.default(plain, 128)
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self.nbytes = plain.nbytes + (0 if self.bias is None else self.bias.nbytes)
        self.library, self.dtype = "oneDNN", dtype
        self.out_features, self.in_features = plain.shape

    def __call__(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        if activation not in POST_OPS:
            raise ValueError(f"linear: activation={activation!r} is unknown; choose one of {', '.join(POST_OPS)}")
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


@functools.cache
def serves(dtype: torch.dtype) -> bool:
    """Whether this torch and processor run the prepacked linear: tried, not guessed from versions."""
    try:
        with torch.no_grad():
            weight = torch.eye(32, dtype=dtype)
            packed = OneDnnLinear(weight, torch.zeros(32, dtype=dtype), dtype)
            x = torch.arange(64, dtype=dtype).view(2, 32)
            return torch.equal(packed(x), x) and torch.equal(packed(x, residual=x), x + x)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def prepack(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> OneDnnLinear | FallbackLinear:
    return (OneDnnLinear if serves(dtype) else FallbackLinear)(weight, bias, dtype)


IMPLEMENTATIONS = {"linear": linear, "linear.prepack": prepack}
