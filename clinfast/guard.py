"""Which calls take the fast path. An allow-list: what is not known to compute the same runs the stock forward.

Nothing here walks `modules()` per call. A `Snapshot` compares flat lists taken at bind, in a few passes that run in C;
only a difference is looked into, and explained or accepted.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clinfast.engine.spec import Match, Request
from clinfast.reason import Reason
from clinfast.snapshot import Snapshot, config_reason

ID_DTYPES = (torch.int64, torch.int32)
MASK_DTYPES = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
TENSORS = ("input_ids", "attention_mask", "token_type_ids")
# Values that ask for what the fast path does anyway.
HARMLESS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False, "use_cache": False}

_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 0)
_functorch_level = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)

SWITCHED_OFF = Reason("CLINFAST_DISABLE is set", quiet=True)
TRAINING = Reason("the model is in training mode", "call model.eval() for inference", dirties=True)
GRAD = Reason(
    "gradients are on and the model's parameters require them",
    "call it under torch.inference_mode() or torch.no_grad(), or pass inference_only=True to optimize()",
    dirties=True,
)
AUTOCAST = Reason("autocast is on", "leave autocast, and choose the precision in optimize() instead")
TRACING = Reason("torch.jit is tracing the model", "traced and exported programs hold the stock model")
EXPORTING = Reason("torch.export is tracing the model", "traced and exported programs hold the stock model")
DISPATCH_MODE = Reason("a torch dispatch or function mode is active", "leave it to get the fast path")
FUNCTORCH = Reason("a torch.func transform is active", "call the model outside of it to get the fast path")
CLASS_CHANGED = Reason("the model's class was changed after optimize()", "call clinfast.optimize(model) again")
TWICE = Reason("an argument is given twice or there are too many", "pass the inputs by name")
NO_IDS = Reason("no input_ids", "pass input_ids as a tensor")
NOT_A_TENSOR = Reason("an input is not a plain torch.Tensor", "pass plain dense tensors")

_ARGUMENTS = {
    "labels": "labels are for training; leave them out for inference",
    "inputs_embeds": "pass input_ids",
    "position_ids": "leave it out: the default positions are served",
    "output_attentions": "attention weights are never formed on the fast path",
    "output_hidden_states": "only the last layer is kept on the fast path",
    "return_dict": "use the fields of the returned output",
    "past_key_values": "only encoders are served",
    "encoder_hidden_states": "only encoders are served",
    "head_mask": "heads cannot be masked on the fast path",
}


class Guard:
    """Decides for one module; built when its forward is replaced.

    Args:
        module: the unit; held by none of the guard's fields, so that it is freed when the user lets go of it.
        match: what it computes.
        inference_only: the caller's promise that no gradients are wanted.
    """

    __slots__ = (
        "__weakref__", "cls", "device", "inference_only", "max_columns", "names", "parameters", "snapshot", "stock",
        "takes_any",
    )  # fmt: skip

    def __init__(self, module: nn.Module, match: Match, *, inference_only: bool = False) -> None:
        self.cls = type(module)
        self.stock = self.cls.forward
        signature = list(inspect.signature(self.stock).parameters.values())[1:]
        self.names = tuple(p.name for p in signature if p.kind is not p.VAR_KEYWORD)
        self.takes_any = len(self.names) < len(signature)
        self.inference_only = inference_only
        self.max_columns = match.encoder.max_positions - match.encoder.position_offset
        self.parameters = list({id(d): d for d in (ref.module._parameters for ref in match.parameters.values())}.values())
        self.device = match.parameters["embedding.word.weight"]
        self.snapshot = Snapshot(module, match)

    def admit(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request | Reason:
        """The call as a request, or the reason why the stock forward has to run."""
        if self.learning(module):
            return TRAINING if module.training else GRAD
        if os.environ.get("CLINFAST_DISABLE", "0") != "0":
            return SWITCHED_OFF
        device = self.device.module._parameters["weight"].device  # type: ignore[union-attr]
        return self._ambient(device) or self.snapshot.reason(module) or self._request(args, kwargs, device)

    def admit_compiling(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Request | Reason:
        """`admit` for traced code: nothing that depends on values or pointers.

        Hooks and swapped submodules are looked at when the call is traced, as `torch.compile` itself does.
        """
        if torch.compiler.is_exporting():
            return EXPORTING
        if module.training:
            return TRAINING
        ...
        raise NotImplementedError
