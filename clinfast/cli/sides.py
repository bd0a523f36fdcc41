"""One model several times: stock, in float64, and optimized with each precision and padding option."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import clinfast
from clinfast import patch
from clinfast.canary import tensors_of
from clinfast.engine import precision
from clinfast.engine.spec import Unsupported
from clinfast.model_folder import DTYPES, BadInput
from clinfast.rounded import rounded_stock

PADDINGS = ("remove", "keep")
Outputs = dict[str, Tensor]
Inputs = dict[str, Tensor]


class RunsStock(Exception):
    """clinfast does not serve this model; the message says why."""


@dataclass(frozen=True)
class Precision:
    """One precision: `optimized` by padding option, and what their error is held against.

    Attributes:
        measure: stock in that precision, where it is lower than the model's own; None means the stock model itself.
        eps: of the coarser of the two dtypes.
        same_bits: a note's bits are promised not to depend on its batch.
    """

    name: str
    optimized: dict[str, nn.Module]
    measure: nn.Module | None
    eps: float
    same_bits: bool


class Sides:
    """
    Args:
        model: stock, in eval mode; it stays so.
        precisions: names to serve; None for the model's own first, and all others that this machine serves.

    Raises:
        RunsStock: an encoder in it is refused, or there is none that clinfast knows.
        BadInput: a precision is unknown or not served here.
    """

    def __init__(self, model: Any, precisions: Sequence[str] | None) -> None:
        self.stock = model
        self.exact = copy.deepcopy(model).double()
        self.accepts = set(inspect.signature(type(model).forward).parameters)
        names = precisions or _served(model.dtype)
        self.precisions = [self._precision(name) for name in names]

    def _precision(self, name: str) -> Precision:
        own = self.stock.dtype
        try:
            dtype = precision.resolve(name, own, self.stock.device.type)
        except (ValueError, Unsupported) as error:
            raise BadInput(f"--precision: {error}") from error
        optimized = {padding: self._optimize(name, padding) for padding in PADDINGS}
        ((_, _, forward), *_) = patch.find_patched(optimized["remove"])
        units = clinfast.report(optimized["remove"]).units
        return Precision(
            name=name if name == "fp8" else DTYPES.get(str(dtype).removeprefix("torch."), name),
            optimized=optimized,
            measure=rounded_stock(optimized["remove"], forward.encoder),
            eps=max(torch.finfo(dtype).eps, torch.finfo(own).eps),
            same_bits=all(unit.path == "" and unit.facts["reproducible"] for unit in units),
        )

    def _optimize(self, precision: str, padding: str) -> nn.Module:
        # The copy shares every tensor with the stock model.
        tensors = [*self.stock.parameters(), *self.stock.buffers()]
        model = copy.deepcopy(self.stock, {id(tensor): tensor for tensor in tensors})
        with quiet():
            try:
                clinfast.optimize(model, precision=precision, padding=padding)
            except (ValueError, Unsupported) as error:
                raise RunsStock(str(error)) from error
        for unit in clinfast.report(model).units:
            if unit.refused is not None:
                raise RunsStock(f"{unit.class_name}{' at ' * bool(unit.path)}{unit.path}: {unit.refused}")
        return model

    def run(self, model: nn.Module, inputs: Inputs) -> Outputs:
        """Outputs by name; inputs that the model does not take are left out."""
        given = {name: value for name, value in inputs.items() if name in self.accepts}
        with torch.inference_mode(), quiet():
            return tensors_of(model(**given))


def _served(own: torch.dtype) -> list[str]:
    return sorted(precision.served("cpu"), key=lambda name: precision.DTYPES[name] is not own)


def stock_calls(model: nn.Module) -> dict[str, int]:
    """Calls that ran stock so far, by reason."""
    return clinfast.report(model).fallbacks


class quiet(warnings.catch_warnings):
    """Our own warnings are told in the tables instead."""

    def __enter__(self) -> None:  # type: ignore[override]
        super().__enter__()
        warnings.simplefilter("ignore", clinfast.ClinfastWarning)


