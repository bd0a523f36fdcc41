"""Launches a kernel: by a cubin of the package, else compiled by Triton in this process, else not at all."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinfast.backends.triton import cubins, device
from clinfast.ops.registry import NotOffered
from clinfast.triton_kernels.variants import KERNELS

Runner = Callable[[tuple[int, int, int], tuple[Any, ...]], None]

_runners: dict[tuple[Any, ...], Runner] = {}
# Launches by what made the code, for tests and reports.
launches = {"cubin": 0, "jit": 0}


class KernelUnavailable(NotOffered):
    """There is no cubin for the call, and Triton cannot compile one here; the message says why."""


class Compilation(NamedTuple):
    """What a kernel is compiled with, besides the types of its arguments."""

    constants: tuple[Any, ...]
    num_warps: int
    num_stages: int
    registers: int


class Matrix:
    """A row-major matrix that a kernel takes through a descriptor, in blocks of `block`."""

    __slots__ = ("block", "dtype", "tensor")

    def __init__(self, tensor: Tensor, block: tuple[int, int]) -> None:
        self.tensor, self.block, self.dtype = tensor, block, tensor.dtype


def launch(
    name: str,
    grid: tuple[int, int, int],
    args: tuple[Any, ...],
    constants: tuple[Any, ...],
    num_warps: int = 4,
    num_stages: int = 2,
    registers: int = 0,
) -> None:
    """Run `name` on the device of its first tensor.

    Args:
        args: tensors, `Matrix`, integers, floats and None, in the kernel's order.
        constants: the kernel's compile-time values, in its order.
        registers: the most that a thread may take; 0 for no bound.

    Raises:
        KernelUnavailable: nothing to run it with.
    """
    first = args[0]
    index = device.index_of(first.tensor if type(first) is Matrix else first)
    run = runner(name, index, args, constants, num_warps, num_stages, registers)
    if device.TYPE == "cuda" and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            run(grid, args)
    else:
        run(grid, args)


def runner(
    name: str,
    index: int,
    args: tuple[Any, ...],
    constants: tuple[Any, ...],
    num_warps: int = 4,
    num_stages: int = 2,
    registers: int = 0,
) -> Runner:
    """What launches `name` for arguments of these types on device `index`, which must be the current one then."""
    kinds = tuple([a.dtype if isinstance(a, (Tensor, Matrix)) else type(a) for a in args])
    key = (name, index, num_warps, num_stages, registers, constants, kinds)
    run = _runners.get(key)
    if run is None:
        run = _runners[key] = _prepare(name, index, args, Compilation(constants, num_warps, num_stages, registers))
    return run


def _prepare(name: str, index: int, args: tuple[Any, ...], how: Compilation) -> Runner:
    compiled = functools.cache(lambda: _jit(name, how))
    loaded = cubins.find(index, name, args, how)
    if loaded is None:
        return compiled()
    fire = loaded.fire

    def run(grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        if fire(grid, args):
            launches["cubin"] += 1
        else:  # unaligned, or a size beyond 32 bits: the cubin was compiled for less
            compiled()(grid, args)

    return run


def _jit(name: str, how: Compilation) -> Runner:
    reason = device.no_compiler()
    if reason is not None:
        return _refusing(name, reason)
    from clinfast.triton_kernels import versions

    spec = KERNELS[name]
    kernel = getattr(importlib.import_module(f"clinfast.triton_kernels.{spec.module}"), name)
    options = dict(zip(spec.constants, how.constants, strict=True))
    options |= versions.options(how.num_warps, how.num_stages, how.registers)
    tried = False

    def run(grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        nonlocal tried
        if not tried:
            _try(name, lambda: kernel[grid](*map(versions.argument, args), **options))
            tried = True
        else:
            kernel[grid](*map(versions.argument, args), **options)
        launches["jit"] += 1

    return run


def _try(name: str, call: Callable[[], Any]) -> None:
    """The first launch compiles; what goes wrong then is Triton's or the machine's affair, unless it is the GPU's."""
    try:
        call()
    except (torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError)):
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise KernelUnavailable(f"Triton could not compile {name}: {first}") from error


def _refusing(name: str, reason: str) -> Runner:
    def run(grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        raise KernelUnavailable(f"the package has no {name} for this card and shape, and {reason}")

    return run
