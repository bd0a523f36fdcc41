"""Which calls take the fast path: an allow-list. What is not known to compute the same runs stock.

Cheap yes-or-no checks come first; only a call that fails one is looked at closely, to say why in plain words.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clinfast.engine.spec import Match, Request
from clinfast.reason import ClinfastWarning, Reason, StrictError
from clinfast.snapshot import Snapshot

__all__ = ["ClinfastWarning", "Guard", "StrictError"]

# The argument of ours: bool [B, S], where a masked-LM head is to compute its logits, which are then [P, V].
POSITIONS = "logits_positions"
ID_DTYPES = (torch.int64, torch.int32)
MASK_DTYPES = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Values that ask for what the fast path does anyway.
HARMLESS = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "use_cache": False,
}

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
AUTOCAST = Reason("autocast is on", "leave autocast, and choose the precision in optimize()")
CAPTURE = Reason(
    "a CUDA graph is being captured", "packing asks the device for the lengths, which a capture forbids", quiet=True
)
TRACING = Reason("the model is being traced or exported", "the exported program holds the stock model", quiet=True)
MODE = Reason("a torch dispatch or function mode is active", "leave it to get the fast path")
FUNCTORCH = Reason("a torch.func transform is active", "call the model outside of it to get the fast path")
ODD_MASK = Reason(
    "attention_mask holds values other than 0 and 1",
    "this model or version of transformers gives them a meaning of their own; pass attention_mask.bool()",
)
CLASS_CHANGED = Reason("the model's class or its forward was changed after optimize()", "optimize() it again")
TWICE = Reason("an argument is given twice, or there are too many", "pass the inputs by name")
UNKNOWN = Reason("an argument that the stock signature does not have", "leave it out")

_ADVICE = {
    "labels": "leave labels out for inference",
    "start_positions": "leave it out for inference",
    "end_positions": "leave it out for inference",
    "next_sentence_label": "leave it out for inference",
    "inputs_embeds": "pass input_ids",
    "position_ids": "leave it out where the positions are the default ones",
    "output_attentions": "the fast path never forms attention weights",
    "output_hidden_states": "the fast path keeps the last layer only",
    "return_dict": "use the fields of the returned output",
    "sentence_order_label": "leave it out for inference",
    "task_type_ids": "the fast path serves task type 0, which stock takes where they are left out",
    "head_mask": "the fast path cannot mask heads",
}


class Guard:
    """Decides for one module; built when its forward is replaced.

    Args:
        module: the unit. No field holds it, so that it is freed when the user lets go of it.
        match: what it computes.
        inference_only: the caller's promise that no gradients are wanted.
    """

    def __init__(self, module: nn.Module, match: Match, *, inference_only: bool = False) -> None:
        self.cls = type(module)
        self.stock = self.cls.forward
        signature = list(inspect.signature(self.stock).parameters.values())[1:]
        self.names = tuple(p.name for p in signature if p.kind is not p.VAR_KEYWORD)
        self.takes_any = len(self.names) < len(signature)
        self.inference_only = inference_only
        self.columns = match.encoder.max_seqlen
        self.has_last_position = match.encoder.position_table
        self.head = match.head
        # A family without token types ignores them where its forward takes them.
        knows_types = self.takes_any or "token_type_ids" in self.names
        self.ignored = {"token_type_ids"} if knows_types and not match.encoder.type_vocab_size else set()
        four = transformers_is_four()
        self.zero_or_one = match.zero_or_one or four
        # Column 0 may be padding that sees no key: a traced call cannot find out, and transformers 4 has it see all.
        self.compiles = not (four and self.head.reads_first_token and match.encoder.has_windows)
        self.parameters = [ref.module._parameters for ref in match.parameters.values()]
        self.word = match.parameters["embedding.word.weight"].module._parameters
        self.snapshot = Snapshot(module, match)

    def admit(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, settled_later: bool = False
    ) -> Request | Reason:
        """The call as a request, or the reason why the stock forward has to run.

        `settled_later` leaves out the module's structure, which the caller asks `changed` about before it hands out a
        result.
        """
        if self.learning(module):
            return TRAINING if module.training else GRAD
        if _switched_off():
            return SWITCHED_OFF
        if type(module) is not self.cls or self.cls.forward is not self.stock:
            return CLASS_CHANGED
        found = None if settled_later else self.snapshot.reason(module)
        if found is not None:
            return found
        device = self.word["weight"].device  # type: ignore[union-attr]
        found = _ambient(device)
        if found is not None:
            return found
        request = self._request(args, kwargs)
        if isinstance(request, Reason):
            return request
        if not self._fit(request, device):
            return self._misfit(request, device)
        if self.zero_or_one and request.attention_mask is not None and _odd_values(request.attention_mask):
            return ODD_MASK
        return self._flat(request)

    def changed(self, module: nn.Module) -> Reason | None:
        """Why the module no longer computes what was matched, or None."""
        return self.snapshot.reason(module)

    def admit_compiling(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request | None:
        """`admit` in code that torch.compile traces: no values, no pointers, no words.

        Hooks, swapped submodules and frozen parameters are looked at while tracing and taken for granted
        after, as `torch.compile` itself does with hooks.
        """
        if not self.compiles or module.training or torch.compiler.is_exporting():
            return None
        if not _settled(self, module, torch.is_grad_enabled()):
            return None
        device = _device(self)
        if torch.is_autocast_enabled(device.type):
            return None
        request = self._request(args, kwargs)
        if isinstance(request, Reason) or request.positions is not None or not self._fit(request, device):
            return None
        return self._flat(request)

    def learning(self, module: nn.Module) -> bool:
        """Whether this call may be part of training, which changes weights without a trace."""
        if module.training:
            return True
        if self.inference_only or not torch.is_grad_enabled():
            return False
        return any(p is not None and p.requires_grad for d in self.parameters for p in d.values())

    def _request(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request | Reason:
        given = kwargs
        if args:
            names = self.names[: len(args)]
            if len(names) < len(args) or any(name in kwargs for name in names):
                return TWICE
            given = {**dict(zip(names, args, strict=True)), **kwargs}
        ids: Any = None
        mask = types = positions = None
        for name, value in given.items():
            if name == "input_ids":
                ids = value
            elif name == "attention_mask":
                mask = value
            elif name in self.ignored:
                continue
            elif name == "token_type_ids" and name in self.names:
                types = value
            elif name == POSITIONS and self.head.selectable:
                positions = value
            elif name not in self.names and not self.takes_any:
                return UNKNOWN
            elif value is not None and (name not in HARMLESS or value is not HARMLESS[name]):
                return _ARGUMENTS.get(name, OTHER)
        return Request(ids, mask, types, positions)

    def _fit(self, request: Request, device: torch.device) -> bool:
        ids, mask, types, positions, _ = request
        if not _plain(ids, ID_DTYPES, device) or ids.dim() != (3 if self.head.choices else 2):
            return False
        shape = ids.shape
        if not 0 < shape[-1] <= self.columns or not shape[0] or not shape[1]:
            return False
        if mask is not None and not (_plain(mask, MASK_DTYPES, device) and mask.shape == shape):
            return False
        if positions is not None and not (_plain(positions, (torch.bool,), device) and positions.shape == shape):
            return False
        return types is None or (_plain(types, ID_DTYPES, device) and types.shape == shape)

    def _flat(self, request: Request) -> Request:
        """[B, C, S] as [B x C, S]."""
        if not self.head.choices:
            return request
        ids, mask, types = (None if x is None else x.flatten(0, 1) for x in request[:3])
        return Request(ids, mask, types, num_choices=request.input_ids.shape[1])  # type: ignore[arg-type]

    def _misfit(self, request: Request, device: torch.device) -> Reason:
        """Why `_fit` said no."""
        ids, mask, types, positions, _ = request
        found = _not_plain("input_ids", ids, ID_DTYPES, "int64 or int32", device)
        if found is not None:
            return found
        shape = list(ids.shape)
        dimensions, wanted = (3, "[batch, choices, tokens]") if self.head.choices else (2, "[batch, tokens]")
        if len(shape) != dimensions:
            return _mistake(f"input_ids is not {dimensions}-D", f"input_ids has shape {shape}; {wanted} is needed")
        if not all(shape):
            return _mistake("the batch is empty", f"input_ids has shape {shape}: there is nothing to compute")
        if shape[-1] > self.columns and not self.has_last_position:
            return Reason(
                "the input is longer than config.max_position_embeddings",
                f"up to {self.columns} columns are served; truncate, or split the text",
            )
        if shape[-1] > self.columns:
            return _mistake(
                "the input is longer than the model's positions",
                f"input_ids has {shape[-1]} columns, but the model has {self.columns} positions; truncate to "
                f"{self.columns}, or split the text",
            )
        for name, value, dtypes, words in (
            ("attention_mask", mask, MASK_DTYPES, "bool or an integer dtype, 1 at real tokens"),
            ("token_type_ids", types, ID_DTYPES, "int64 or int32"),
            (POSITIONS, positions, (torch.bool,), "bool, True where logits are wanted,"),
        ):
            if value is None:
                continue
            found = _not_plain(name, value, dtypes, words, device)
            if found is not None:
                return found
            if list(value.shape) != shape:
                return _mistake(
                    f"{name} does not have the shape of input_ids",
                    f"{name} has shape {list(value.shape)}, but input_ids has shape {shape}",
                )
        return OTHER


# Asking os.environ encodes the name and decodes the value, 0.6 us of every call; what is below it does neither.
_environment = getattr(os.environ, "_data", None) if os.name == "posix" else None


def _switched_off() -> bool:
    if _environment is None:
        return os.environ.get("CLINFAST_DISABLE", "0") not in ("0", "")
    return _environment.get(b"CLINFAST_DISABLE", b"0") not in (b"0", b"")


def _ambient(device: torch.device) -> Reason | None:
    """What the calling thread has switched on around the call."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return CAPTURE
    if torch.is_autocast_enabled(device.type):
        return AUTOCAST
    if torch.jit.is_tracing():
        return TRACING
    if _dispatch_modes() or (_function_modes() and _function_mode_matters()):
        return MODE
    if _functorch_level() is not None:
        return FUNCTORCH
    return None


def _function_mode_matters() -> bool:
    """`torch.set_default_device` and `with torch.device(...)` are modes that only fill in a device."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def transformers_is_four() -> bool:
    """transformers 4 takes a mask apart as 1 - mask, and 2 means masked; from 5 on, all but 0 is kept."""
    version = getattr(sys.modules.get("transformers"), "__version__", "5")
    return int(version.partition(".")[0]) < 5


def _odd_values(mask: Tensor) -> bool:
    if mask.dtype is torch.bool:
        return False
    low, high = torch.aminmax(mask)
    return bool(low < 0) or bool(high > 1)


def _settled(guard: Guard, module: nn.Module, grad: bool) -> bool:
    return guard.snapshot.reason(module) is None and not (grad and guard.learning(module))


def _device(guard: Guard) -> torch.device:
    return guard.word["weight"].device  # type: ignore[union-attr]


# What torch.compiler.assume_constant_result does, without importing torch._dynamo for it.
_settled._dynamo_marked_constant = True  # type: ignore[attr-defined]
_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _plain(value: Any, dtypes: tuple[torch.dtype, ...], device: torch.device) -> bool:
    return (
        type(value) is Tensor
        and value.dtype in dtypes
        and value.layout is torch.strided
        and value.device == device
        and not value.is_nested
    )


def _not_plain(
    name: str, value: Any, dtypes: tuple[torch.dtype, ...], words: str, device: torch.device
) -> Reason | None:
    if value is None:
        return _mistake(f"no {name}", f"{name} is missing; pass it as a tensor")
    if type(value) is not Tensor:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return _mistake(f"{name} is not a plain tensor", f"{name} is a {kind}; a torch.Tensor is needed")
    if value.dtype not in dtypes:
        return _mistake(f"the dtype of {name}", f"{name} is {value.dtype}; {words} is served")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        return _mistake(f"{name} is not a dense tensor", f"{name} is {kind}; a dense tensor is needed")
    if value.device != device:
        return _mistake(
            f"{name} is not on the model's device",
            f"{name} is on {value.device}, but the model is on {device}",
        )
    return None


def _mistake(phrase: str, sentence: str) -> Reason:
    return Reason(phrase, sentence, mistake=sentence)


_ARGUMENTS = {name: Reason(f"the argument {name}", advice) for name, advice in _ADVICE.items()}
_ARGUMENTS |= {
    name: Reason(f"the argument {name}", "only encoders without a cache are served")
    for name in (
        "encoder_hidden_states",
        "encoder_attention_mask",
        "past_key_values",
        "use_cache",
        "is_causal",
    )
}
OTHER = Reason("an argument that the fast path does not serve", "leave it out")
