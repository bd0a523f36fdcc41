"""Ops by name, and which backend serves each.

An op has one schema (registered with `torch.library`), an fp32 reference, and one implementation a backend. Backends
are tried in the order of `BACKENDS`, on a GPU after the one that `choices.TABLE` puts first; the environment variable
`CLINFAST_BACKEND_<OP>=<backend>` overrides the choice for one op, to bisect a problem in production; that of a stem,
such as `CLINFAST_BACKEND_ATTENTION`, goes for its variants too.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

from clinfast.ops import choices

NAMESPACE = "clinfast"
STEMS = ("packing", "embedding", "linear", "attention", "layer_norm", "gelu", "pooling")
# What kernels compute in, by type of device.
KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


@dataclasses.dataclass(frozen=True)
class Backend:
    """`home` is its Python module; `devices` are the types of device whose tensors it takes."""

    home: str
    devices: tuple[str, ...]


BACKENDS = {
    "cpu": Backend("clinfast.backends.cpu", ("cpu",)),
    "triton": Backend("clinfast.backends.triton", ("cuda",)),
    "cuda": Backend("clinfast.backends.cuda", ("cuda",)),
    "torch": Backend("clinfast.backends.torch", ("cpu", "cuda")),
}

library = torch.library.Library(NAMESPACE, "DEF")
calls: collections.Counter[str] = collections.Counter()


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation.

    Args:
        name: a stem, or a stem with a suffix where one file holds two ops.
        schema: torch schema without the name, e.g. `"(Tensor x) -> Tensor"`.
        reference: the plain PyTorch definition; computes in the dtype of its inputs, so it serves fp64 too.
        fake: shape and dtype of the result for tracing.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]


OPS: dict[str, Op] = {}


def define(op: Op) -> Callable[..., Any]:
    """Register `op` under `torch.ops.clinfast.<name>` and return the function that calls the chosen backend."""
    if op.name in OPS:
        raise ValueError(f"the op {op.name!r} is defined already")
    OPS[op.name] = op
    library.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any, **kwargs: Any) -> Any:
        return implementation(op.name, "auto", _device_of(args, kwargs))(*args, **kwargs)

    for key in ("CPU", "CUDA"):
        library.impl(op.name, run, key)
    library.impl(op.name, functools.partial(_no_gradient, op.name), "Autograd")
    # What torch.library.register_fake is for; that one asks `inspect` for its caller, which takes 40 ms at import.
    library.impl(op.name, op.fake, "Meta")
    return run


def _no_gradient(name: str, *args: Any, **kwargs: Any) -> Any:
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            f"clinfast::{name} has no gradient; call it under torch.no_grad() or on tensors that need no gradient"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.clinfast, name)(*args, **kwargs)


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return next((tensor.device.type for tensor in tensors), "cpu")


def check_backend(backend: str) -> None:
    """Raises ValueError for an unknown one."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose 'auto', " + ", ".join(map(repr, BACKENDS)))


def order(backend: str, device: str) -> list[str]:
    """Backends to try for the option `backend` on tensors of a `device` type, best first.

    Raises:
        ValueError: an unknown backend, or one that does not take tensors of that device.
    """
    if backend == "auto":
        return [name for name, found in BACKENDS.items() if device in found.devices]
    check_backend(backend)
    if device not in BACKENDS[backend].devices:
        served = ", ".join(map(repr, order("auto", device)))
        raise ValueError(f"backend={backend!r} does not serve tensors on {device}; choose 'auto' or one of {served}")
    return [backend]


def unavailable(backend: str) -> str | None:
    """None where a backend of that name is ready on this machine, else the reason in a sentence."""
    module = importlib.import_module(BACKENDS[backend].home)
    reason: str | None = module.unavailable() if hasattr(module, "unavailable") else None
    return reason


@functools.cache
def implementation(name: str, backend: str, device: str = "cpu", *, prechecked: bool = False) -> Callable[..., Any]:
    """The function that serves op `name` on `device`: the first backend in `order` that offers it.

    `prechecked` asks for a form that takes the values of ids, indices and boundaries for checked, as those are that
    `pack` made: on an accelerator, looking at them again would wait for it.
    """
    chosen = _override(name.partition(".")[0]) or backend
    candidates = order(chosen, device)
    if chosen != "auto" or device != "cuda":
        return _first_offer(name, tuple(candidates), prechecked)
    card = choices.capability()
    return choices.by_dtype(
        {
            dtype: _first_offer(name, tuple(choices.ranked(name, candidates, dtype, card)), prechecked)
            for dtype in KERNEL_DTYPES["cuda"]
        }
    )


def _override(op: str) -> str | None:
    names = (op, *(stem for stem in STEMS if op.startswith(f"{stem}_")))
    return next(filter(None, (os.environ.get(f"CLINFAST_BACKEND_{name.upper()}") for name in names)), None)


def _first_offer(name: str, candidates: tuple[str, ...], prechecked: bool) -> Callable[..., Any]:
    for candidate in candidates:
        found = _offer(name, candidate, prechecked)
        if found is not None:
            return found
    raise RuntimeError(
        f"no backend of {', '.join(candidates)} serves the op {name!r}; backend='torch' serves every op everywhere"
    )


@functools.cache
def _offer(name: str, backend: str, prechecked: bool) -> Callable[..., Any] | None:
    offered = importlib.import_module(BACKENDS[backend].home).implementations()
    found = (offered.get(f"{name}.prechecked") if prechecked else None) or offered.get(name)
    return None if found is None else counted(f"{name}[{backend}]", found)


def optional(name: str, backend: str, device: str = "cpu") -> Callable[..., Any] | None:
    """What the best backend offers under `name` beyond the ops, or None. An override of any op switches it off."""
    if any(os.environ.get(f"CLINFAST_BACKEND_{stem.upper()}") for stem in (*STEMS, *OPS, name)):
        return None
    return importlib.import_module(BACKENDS[order(backend, device)[0]].home).implementations().get(name)


def counted(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[label] += 1
        return function(*args, **kwargs)

    return call
