"""Finds the modules to optimize, replaces their forward, and takes the replacement back.

Knows modules; what they compute is the adapters' business, and how it is computed is the engine's.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from clinfast import models
from clinfast.engine.spec import Match, Unsupported
from clinfast.forward import (
    ANCHOR,
    REPLICATE,
    PatchedForward,
    StockReplica,
    StockState,
    anchored,
    on_top,
    unlink,
)
from clinfast.models import checks

if TYPE_CHECKING:
    from clinfast.engine.encoder import Encoder

# Not on the module, where copies and pickles would carry it along.
_refused: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


class Unit(NamedTuple):
    """An encoder found in a target: its dotted `path` ("" for the target itself), and what it computes.

    `refused` says why a known class cannot be served; `match` is None then.
    """

    path: str
    module: nn.Module
    match: Match | None
    refused: str | None = None


def families() -> list[str]:
    """Names of the families that have an adapter."""
    return sorted(home.split(".")[2].replace("_", "-") for home in models.FAMILIES)


def find_units(target: Any) -> list[Unit]:
    """The outermost modules whose class an adapter knows, refused ones among them with the reason.

    A head that is refused gives way to its base model; where that is refused too, its reason is the one told.

    Args:
        target: a module, or an object that holds one as `.model`: a transformers pipeline, a CrossEncoder.

    Raises:
        TypeError: neither.
    """
    root, prefix = _root(target)
    units: list[Unit] = []
    seen: set[int] = set()

    def visit(module: nn.Module, path: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        before, refused = len(units), None
        try:
            match = models.match(module)
            if match is not None:
                _refuse_foreign_forward(module)
                units.append(Unit(path, module, match))
                return
        except Unsupported as refusal:
            refused = str(refusal)
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{path}.{name}" if path else name)
        if refused is not None and len(units) == before:
            units.append(Unit(path, module, None, refused))

    visit(root, prefix)
    return units


def _root(target: Any) -> tuple[nn.Module, str]:
    if isinstance(target, nn.Module):
        return target, ""
    model = getattr(target, "model", None)
    if isinstance(model, nn.Module):
        return model, "model"
    kind = f"{type(target).__module__}.{type(target).__qualname__}"
    raise TypeError(
        f"a {kind} cannot be optimized; pass a torch.nn.Module, a transformers pipeline, a "
        "SentenceTransformer or a CrossEncoder"
    )


def _refuse_foreign_forward(module: nn.Module) -> None:
    if anchored(module) is None and checks.foreign_forward(module) is not None:
        raise Unsupported(
            f"it already has a forward of its own ({checks.describe_forward(module)}); remove that, call "
            "optimize(), and add it again: it then runs on top"
        )


def find_patched(target: Any) -> list[tuple[str, nn.Module, PatchedForward]]:
    """Every module in `target` with a live patch, and its path."""
    root, prefix = _root(target)
    found = ((path, module, patched(module)) for path, module in root.named_modules(prefix=prefix))
    return [(path, module, forward) for path, module, forward in found if forward is not None]


def patched(module: nn.Module) -> PatchedForward | None:
    """The live patch of `module`, also where another wrapper sits on top of it."""
    forward = anchored(module)
    return forward if forward is not None and forward.live and "forward" in module.__dict__ else None


def bind(
    module: nn.Module, match: Match, encoder: Encoder, *, strict: bool = False, inference_only: bool = False
) -> PatchedForward:
    """Replace the forward of `module` by `encoder`, guarded.

    Raises:
        Unsupported: the instance has a forward of its own that is not ours, as under an accelerate hook.
        ValueError: it is bound already.
    """
    if patched(module) is not None:
        raise ValueError(f"{type(module).__name__} is optimized already; restore() it first")
    _refuse_foreign_forward(module)
    forward = anchored(module)
    # One that was restored under a wrapper is still called by it, and is used again.
    if forward is None or "forward" not in module.__dict__:
        forward = PatchedForward(module)
    forward.arm(module, match, encoder, strict=strict, inference_only=inference_only)
    state = module.__dict__
    state[ANCHOR], state[REPLICATE] = StockState(forward), StockReplica(forward)
    if checks.foreign_forward(module) is None:
        state["forward"] = forward
    _refused.pop(module, None)
    return forward


def unbind(module: nn.Module) -> bool:
    """Give the stock forward back; False where there was nothing to undo.

    Under another wrapper the patch stays in place, passes calls on, and removes itself at the first call once
    that wrapper is gone: deleting the instance's forward would take the wrapper away.
    """
    forward = anchored(module)
    if forward is None or not forward.live:
        return False
    forward.disarm()
    if on_top(module, forward) or "forward" not in module.__dict__:
        unlink(module)
    return True


def stock_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the model would do without us: the forward of its class."""
    if anchored(module) is None:
        return module.forward(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def mark_refused(module: nn.Module, reason: str) -> None:
    """Remember why `module` was left stock, for the report."""
    _refused[module] = reason


def find_refused(target: Any) -> list[tuple[str, nn.Module, str]]:
    """Modules in `target` that were left stock: path, module, reason."""
    root, prefix = _root(target)
    return [
        (path, module, _refused[module]) for path, module in root.named_modules(prefix=prefix) if module in _refused
    ]


def clear_refused(target: Any) -> None:
    """Forget what `mark_refused` was told of the modules in `target`."""
    for _, module, _ in find_refused(target):
        _refused.pop(module, None)
