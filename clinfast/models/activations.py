"""What stands where an activation is called, and what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from clinfast.engine.spec import Activation, Unsupported

# transformers spells the tanh form of GELU in several ways that differ by rounding only.
MODULES: dict[str, Activation] = {
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.GELUActivation": "gelu",
    "torch.nn.modules.activation.ReLU": "relu",
}
# Served where a reader asks for it.
SILU = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")
FUNCTIONS: dict[Any, Activation] = {
    nn.functional.gelu: "gelu",
    nn.functional.relu: "relu",
    torch.relu: "relu",
}


def activation(module: Any, path: str, *, silu: bool = False) -> Activation:
    """The activation at `path`; `silu`: SiLU may stand there.

    Raises:
        Unsupported: one that is not served.
    """
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if silu and name in SILU:
        return "silu"
    if name in MODULES:
        return MODULES[name]
    if callable(module) and not isinstance(module, nn.Module) and module.__hash__ and module in FUNCTIONS:
        return FUNCTIONS[module]
    served = "'gelu', 'gelu_new', 'gelu_pytorch_tanh'" + ", 'silu'" * silu
    raise Unsupported(f"{path} is {name}; hidden_act {served} or 'relu' is served")
