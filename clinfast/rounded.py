"""Stock in the precision that the fast path computes in: what its error is held against where that is a lower one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from clinfast import patch
from clinfast.backends.fp8 import quantise_rows
from clinfast.engine.encoder import Encoder


class Fp8Linear(nn.Linear):
    """Stock's linear on factors that were rounded to e4m3, a scale a row, and summed in fp32."""

    rounded: Tensor

    def forward(self, x: Tensor) -> Tensor:
        values, scale = quantise_rows(x.flatten(0, -2))
        bias = None if self.bias is None else self.bias.float()
        y = functional.linear(values.float() * scale, self.rounded, bias)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


def rounded_stock(module: nn.Module, encoder: Encoder) -> nn.Module | None:
    """A stock copy of the optimized `module` in the precision of `encoder`; None where that is no lower than its own.

    In fp8, the layers' products round their factors as ours do, wherever in `module` they stand.
    """
    lower = torch.finfo(encoder.dtype).eps > torch.finfo(encoder.model_dtype).eps
    if encoder.precision != "fp8":
        return copy.deepcopy(module).to(encoder.dtype) if lower else None
    names = {id(child): name for name, child in module.named_modules()}
    stock = copy.deepcopy(module)
    for _, _, forward in patch.find_patched(module):
        for name, ref in forward.match.parameters.items():
            *_, stem, kind = name.split(".")
            if not name.startswith("layers.") or stem not in forward.match.encoder.layer_linears or kind != "weight":
                continue
            linear = stock.get_submodule(names[id(ref.module)])
            assert isinstance(linear, nn.Linear)
            values, scale = quantise_rows(linear.weight.detach().float())
            linear.__class__ = Fp8Linear
            linear.rounded = values.float() * scale
    return stock.to(encoder.dtype)
