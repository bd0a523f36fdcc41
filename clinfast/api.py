"""The public functions."""

from __future__ import annotations

import dataclasses
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import nn

from clinfast import canary, patch
from clinfast.backends import cpu
from clinfast.backends.cpu import native
from clinfast.engine import compiled
from clinfast.engine.concurrency import available_cores
from clinfast.engine.encoder import Encoder
from clinfast.engine.spec import Request, Unsupported
from clinfast.guard import ClinfastWarning, StrictError, transformers_is_four
from clinfast.integrations import attention_interface
from clinfast.ops import registry
from clinfast.report import Info, Report, UnitReport, Verification
from clinfast.verify import verify_module

__all__ = ["ClinfastWarning", "StrictError"]

Target = TypeVar("Target")


@dataclasses.dataclass(frozen=True)
class Options:
    precision: str
    backend: str
    padding: str
    reproducible: bool | None
    inference_only: bool
    strict: bool
    weights: str

    def __post_init__(self) -> None:
        registry.check_backend(self.backend)
        if self.padding not in ("remove", "keep"):
            raise ValueError(f"padding={self.padding!r} is unknown; choose 'remove' or 'keep'")
        if self.weights == "release":
            raise Unsupported("weights='release' is not served on the CPU yet; weights='keep' works everywhere")
        if self.weights != "keep":
            raise ValueError(f"weights={self.weights!r} is unknown; choose 'keep' or 'release'")
        if self.reproducible not in (None, True, False):
            raise ValueError(f"reproducible={self.reproducible!r} must be True, False or None")
        for name in ("inference_only", "strict"):
            if getattr(self, name) not in (True, False):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")


def optimize(
    model: Target,
    *,
    precision: str = "auto",
    backend: str = "auto",
    padding: str = "remove",
    reproducible: bool | None = None,
    inference_only: bool = False,
    strict: bool = False,
    weights: str = "keep",
) -> Target:
    """Make `model` fast, in place.

    Args:
        model: a transformers model, a `pipeline`, a `SentenceTransformer` or `CrossEncoder`, or any `nn.Module` that
            contains an encoder that clinfast knows.
        precision: `"auto"` (the model's own dtype), `"fp32"`, `"bf16"`, on a GPU also `"fp16"` and
            `"fp8"` (the layers' products in e4m3, from Hopper on); outputs keep the model's dtype.
        backend: `"auto"`, `"cpu"` (compiled kernels), `"triton"` or `"cuda"` (kernels for NVIDIA GPUs), or `"torch"`
            (pure PyTorch).
        padding: `"remove"` computes real tokens only and returns zeros at padded positions; `"keep"` computes every
            position as stock does.
        reproducible: True demands that a note's output has the same bits in any batch; on the CPU that is so by
            default, and `report` says whether this machine proved it.
        inference_only: you promise that no gradients are wanted, so a missing `torch.no_grad()` costs nothing.
        strict: raise `StrictError` where the stock forward would have to run.
        weights: `"keep"` leaves the stock weights where they are.

    Returns:
        The same object.

    Raises:
        ValueError: an unknown option, nothing to optimize in `model`, or a model that is optimized already.
        Unsupported: with `strict=True`, a model whose configuration is not served; an option that this machine does
            not serve; or a trial batch that differs from stock. The model is then left as it was.
    """
    options = Options(precision, backend, padding, reproducible, inference_only, strict, weights)
    units = patch.find_units(model)
    if not units:
        raise ValueError(
            f"there is nothing to optimize in {type(model).__name__}: no encoder of the families "
            f"{', '.join(patch.families())} was found in it"
        )
    for unit in units:
        if patch.patched(unit.module) is not None:
            raise ValueError(f"{_name(unit)} is optimized already; call clinfast.restore(model) first")
    if backend == "auto":
        _warn_of_slow(units)
    else:
        for device in _devices(units):
            registry.order(backend, device)
        if (reason := registry.unavailable(backend)) is not None:
            raise ValueError(f"backend={backend!r} is not there: {reason}; backend='torch' works everywhere")
    refused: list[tuple[patch.Unit, str]] = []
    try:
        for unit in units:
            if unit.refused is None:
                _optimize_unit(unit, options)
            elif strict:
                raise Unsupported(f"{_name(unit)}: {unit.refused}")
            else:
                refused.append((unit, unit.refused))
    except BaseException:
        for unit in units:
            patch.unbind(unit.module)
        raise
    for unit, reason in refused:
        patch.mark_refused(unit.module, reason)
        warnings.warn(f"{_name(unit)} is left stock: {reason}", ClinfastWarning, stacklevel=2)
    return model


def _warn_of_slow(units: Sequence[patch.Unit]) -> None:
    """Where only pure PyTorch is left for the devices that the units are on."""
    for device in _devices(units):
        reasons = [registry.unavailable(name) for name in registry.order("auto", device)[:-1]]
        if reasons and None not in reasons:
            warnings.warn(
                f"the compiled kernels are not there ({'; '.join(map(str, reasons))}); pure PyTorch serves, at a part "
                "of the speed",
                ClinfastWarning,
                stacklevel=3,
            )


def _devices(units: Sequence[patch.Unit]) -> list[str]:
    """The types of device that the units' weights are on."""
    matches = [unit.match for unit in units if unit.match is not None]
    return sorted({next(iter(match.parameters.values())).tensor().device.type for match in matches})


def _optimize_unit(unit: patch.Unit, options: Options) -> None:
    match = unit.match
    assert match is not None
    if options.padding == "keep" and match.encoder.has_windows and transformers_is_four():
        raise Unsupported(
            "padding='keep' is not served with a sliding window on transformers 4, where a padded token that sees no "
            "key attends to all; pass padding='remove'"
        )
    encoder = Encoder(
        match,
        precision=options.precision,
        backend=options.backend,
        padding=options.padding,
        reproducible=options.reproducible,
    )
    try:
        error = canary.check(unit.module, match, encoder)
    except NotImplementedError as refusal:  # a kernel that only its first call could find missing
        raise Unsupported(str(refusal)) from refusal
    forward = patch.bind(
        unit.module, match, encoder, strict=options.strict, inference_only=options.inference_only
    )
    forward.canary_error = error
    compiled.announce(encoder)


def _name(unit: patch.Unit) -> str:
    return f"{type(unit.module).__name__} at {unit.path!r}" if unit.path else type(unit.module).__name__


def _patched(model: Any, action: str) -> list[tuple[str, nn.Module, patch.PatchedForward]]:
    found = patch.find_patched(model)
    if not found:
        refused = [f" ({reason})" for _, _, reason in patch.find_refused(model)[:1]] or [""]
        raise ValueError(
            f"{action}: {type(model).__name__} is not optimized{refused[0]}; call clinfast.optimize(model) first"
        )
    return found


def restore(model: Target) -> Target:
    """Undo `optimize`: the same object, its stock forward and nothing of ours left. Harmless on a stock model."""
    for _, module, _ in patch.find_patched(model):
        patch.unbind(module)
    patch.clear_refused(model)
    return model


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Within the context, and in this thread only, `model` runs its stock forward."""
    with ExitStack() as stack:
        for _, _, forward in _patched(model, "disabled"):
            stack.enter_context(forward.disable())
        yield


def refresh(model: Any) -> None:
    """Pack the weights anew, after a change that leaves no trace (a write to single rows through `.data`)."""
    for _, _, forward in _patched(model, "refresh"):
        forward.encoder.pack()


def warmup(model: Any, lengths: Sequence[int | Sequence[int]] = (16, 64, 128, 256, 512)) -> None:
    """Run one note of each length, so that the first request is as fast as the thousandth.

    On a GPU this captures the graphs that such requests will replay. A sequence among `lengths` is a batch: the lengths
    of its notes, in tokens.
    """
    for _, _, forward in _patched(model, "warmup"):
        encoder = forward.encoder
        device = encoder.refs[0].tensor().device
        for entry in lengths:
            notes = [entry] if isinstance(entry, int) else list(entry)
            sizes = torch.tensor([max(1, min(int(n), encoder.spec.max_seqlen)) for n in notes])
            mask = torch.arange(int(sizes.max())) < sizes[:, None]
            ids = torch.zeros(mask.shape, dtype=torch.long, device=device)
            encoder.run(Request(ids, mask.to(device), None), asked=True)


def report(model: Any) -> Report:
    """What was optimized, how calls ran so far, and why some of them ran stock."""
    units = []
    for path, module, forward in patch.find_patched(model):
        units.append(
            UnitReport(
                path=path,
                class_name=type(module).__name__,
                calls_fast=forward.calls_fast,
                calls_stock=forward.calls_stock,
                fallbacks=dict(forward.fallbacks),
                facts=forward.encoder.describe(),
                canary_error=forward.canary_error,
                refused=None,
                verified=forward.verified,  # type: ignore[arg-type]
            )
        )
    for path, module, reason in patch.find_refused(model):
        units.append(UnitReport(path, type(module).__name__, 0, 0, {}, {}, None, reason))
    return Report(tuple(units), dict(registry.calls), native.isa(), tuple(registry.substitutes))


def verify(model: Any, inputs: Any, *, tolerance: float | None = None) -> Verification:
    """Compare ours with stock on real inputs, both against the same model in float64.

    Args:
        model: an optimized transformers model.
        inputs: what its tokenizer returns, or a list of such batches.
        tolerance: largest allowed absolute difference from stock; None asks instead that our error is at most twice
            stock's own.
    """
    found = _patched(model, "verify")
    if len(found) > 1:
        raise ValueError(f"verify: {type(model).__name__} holds {len(found)} optimized encoders; pass one of them")
    return verify_module(found[0][1], inputs, tolerance)


def info() -> Info:
    """What this machine has."""
    reason = cpu.unavailable()
    isas = tuple(native.kernels().available_isas()) if reason is None else ()
    return Info(
        cpu=_processor(),
        isa=native.isa() or "torch",
        isas=isas,
        threads=torch.get_num_threads(),
        cores=available_cores(),
        backends={name: registry.unavailable(name) or "ready" for name in registry.BACKENDS},
        versions={
            "clinfast": _version("clinfast"),
            "torch": torch.__version__,
            "transformers": _version("transformers"),
            "python": platform.python_version(),
        },
        attention_interface=attention_interface.describe(),
    )


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
