"""The object that stands at `module.forward`, and what keeps every copy of the module stock.

It lies in `module.__dict__["forward"]` and refers to its module weakly, so that a model is freed as a stock
one is. `__getstate__` and `_replicate_for_data_parallel` on the instance leave our keys out of copies, pickles
and replicas; `__deepcopy__` and `__reduce__` stand in the stock method where a wrapper holds us under another
name.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from clinfast.engine import compiled
from clinfast.engine.spec import Match, NotServed, Request, Unsupported
from clinfast.guard import POSITIONS, Guard
from clinfast.reason import Reason, StrictError, warn

# Dynamo of torch 2.6 cannot call the guard while it traces; older releases than those tested compile the stock model.
COMPILES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)

if TYPE_CHECKING:
    from clinfast.engine.encoder import Encoder

ANCHOR, REPLICATE = "__getstate__", "_replicate_for_data_parallel"
DISABLED = Reason("inside disabled(model)", quiet=True)
# A phrase names no values, so there are few; the cap holds against a source that does name some.
MAX_REASONS = 64
OTHER_REASONS = "other reasons"

_lock = threading.Lock()


class _Changed(Exception):
    """The module was found changed after the device had been given its work."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class _PerThread(threading.local):
    count = 0


class _Armed(NamedTuple):
    """What a call needs, read at once: another thread may restore the model meanwhile."""

    match: Match
    encoder: Encoder
    guard: Guard


class PatchedForward:
    """What stands at `module.forward`.

    Attributes:
        calls_fast, calls_stock: counts since `bind`; close to exact when threads race.
        fallbacks: stock calls by reason.
        canary_error: largest difference from stock that was seen before the model was handed over.
        strict: raise `StrictError` where stock would have to run.
        inference_only: no gradients are wanted, whatever the grad mode.
        verified: what `verify` last found, or None.
    """

    __slots__ = (
        "__signature__", "__weakref__", "_armed", "_module", "_paused", "_paused_here", "_warned",
        "calls_fast", "calls_stock", "canary_error", "fallbacks", "inference_only", "strict", "verified",
    )  # fmt: skip

    __name__ = "forward"  # functools.update_wrapper and pickling of bound methods ask for it

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.__signature__ = inspect.signature(MethodType(type(module).forward, module))
        self._armed: _Armed | None = None
        self._paused = 0
        self._paused_here = _PerThread()

    def arm(self, module: nn.Module, match: Match, encoder: Encoder, *, strict: bool, inference_only: bool) -> None:
        self.strict, self.inference_only = strict, inference_only
        self.calls_fast = self.calls_stock = 0
        self.canary_error: float | None = None
        self.verified: object = None
        self.fallbacks: Counter[str] = Counter()
        self._warned: dict[str, object] = {}
        self._armed = _Armed(match, encoder, Guard(module, match, inference_only=inference_only))

    def disarm(self) -> None:
        """Pass every call on to stock from now on, and let go of the packed weights."""
        self._armed = None

    @property
    def live(self) -> bool:
        return self._armed is not None

    @property
    def encoder(self) -> Encoder:
        return self._armed.encoder  # type: ignore[union-attr]

    @property
    def match(self) -> Match:
        return self._armed.match  # type: ignore[union-attr]

    @property
    def disabled(self) -> int:
        """How many `disable()` contexts the calling thread is in."""
        return self._paused_here.count

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Calls of this thread run stock inside; compiled calls of every thread do."""
        self._paused_here.count += 1
        with _lock:
            self._paused += 1
        try:
            yield
        finally:
            self._paused_here.count -= 1
            with _lock:
                self._paused -= 1

    @property
    def module(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError("the model of this forward no longer exists; keep the model, not model.forward")
        return module

    @property
    def __code__(self) -> CodeType:
        """Stock's, for torch.export, which names the program after it."""
        code: CodeType = type(self.module).forward.__code__
        return code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, armed = self.module, self._armed
        if args and args[0] is module:  # accelerate's unwrap_model binds us as if we were a function
            args = args[1:]
        if armed is None:
            return self._after_restore(module, args, kwargs)
        if torch.compiler.is_compiling():
            call = self._compiling if COMPILES else _stock
            return call(module, armed, args, kwargs)
        if self._paused_here.count:
            return self._fall_back(module, armed, DISABLED, args, kwargs)
        guard, encoder = armed.guard, armed.encoder
        later = encoder.graphs is not None
        request = guard.admit(module, args, kwargs, settled_later=later)
        if not isinstance(request, Request):
            # A mistake in the arguments of a module that changed is stock's to judge.
            changed = guard.changed(module) if later and request.mistake is not None else None
            return self._fall_back(module, armed, changed or request, args, kwargs)

        def check() -> None:
            found = guard.changed(module)
            if found is not None:
                raise _Changed(found)

        try:
            output = encoder.run(request, check) if later else encoder.run(request)
        except _Changed as changed_module:
            reason = changed_module.reason
        except (NotServed, Unsupported) as refusal:
            reason = Reason(str(refusal))
        else:
            self.calls_fast += 1
            return armed.match.build_output(output, request)
        return self._fall_back(module, armed, reason, args, kwargs)

    def _compiling(self, module: nn.Module, armed: _Armed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # No counters here: traced Python that counts recompiles at every call.
        request = None if self._paused else armed.guard.admit_compiling(module, args, kwargs)
        output = None if request is None else compiled.forward(armed.encoder, request)
        if request is None or output is None:
            return _stock(module, armed, args, kwargs)
        return armed.match.build_output(output, request)

    def _after_restore(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if on_top(module, self) and not torch.compiler.is_compiling():  # the wrapper above is gone by now
            unlink(module)
        return type(module).forward(module, *args, **kwargs)

    def _fall_back(
        self, module: nn.Module, armed: _Armed, reason: Reason, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if reason.dirties or armed.guard.learning(module):
            armed.encoder.mark_dirty()
        if self.strict and not reason.quiet and reason.mistake is None:
            raise StrictError(reason.sentence(module))
        self.calls_stock += 1
        self._count(module, reason)
        try:
            output = _stock(module, armed, args, kwargs)
        except Exception as error:
            if reason.mistake is not None:
                error.args = (f"{reason.mistake} (the stock forward says: {error})",)
            raise
        if self.strict and not reason.quiet:
            raise StrictError(reason.sentence(module))
        return output

    def _count(self, module: nn.Module, reason: Reason) -> None:
        key: str = reason
        if reason not in self.fallbacks and len(self.fallbacks) >= MAX_REASONS:
            key = OTHER_REASONS
        self.fallbacks[key] += 1
        mine = object()
        # setdefault is atomic: of several threads that meet a reason first, one warns.
        if not reason.quiet and self._warned.setdefault(key, mine) is mine:
            warn(f"{reason.sentence(module)}. This is said once; clinfast.report(model) counts such calls")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = self.module
        return MethodType(type(module).forward, copy.deepcopy(module, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, "forward")


def _stock(module: nn.Module, armed: _Armed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The stock forward, which does not know `logits_positions`: it computes everywhere, and we choose."""
    if not armed.match.head.selectable or kwargs.get(POSITIONS) is None:
        return type(module).forward(module, *args, **{k: v for k, v in kwargs.items() if k != POSITIONS})
    kwargs = dict(kwargs)
    positions = kwargs.pop(POSITIONS)
    output = type(module).forward(module, *args, **kwargs)
    if isinstance(output, tuple):
        raise ValueError("logits_positions needs an output with names; pass return_dict=True")
    logits = output["logits"]
    # Any other index would pick something, and not what was meant.
    if not isinstance(positions, Tensor) or positions.dtype is not torch.bool or positions.shape != logits.shape[:2]:
        given = _describe(positions) if isinstance(positions, Tensor) else f"a {type(positions).__qualname__}"
        raise ValueError(f"logits_positions is {given}; a bool tensor {list(logits.shape[:2])} is needed")
    output["logits"] = logits[positions]
    return output


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype}"


class StockState:
    """`module.__getstate__`: the state without our keys. Anchors the patch, whatever wrapper sits on top."""

    __slots__ = ("patched",)

    def __init__(self, patched: PatchedForward) -> None:
        self.patched = patched

    def __call__(self) -> Any:
        module = self.patched.module
        get_state = getattr(type(module), "__getstate__", None)
        state = module.__dict__ if get_state is None else get_state(module)
        return _without_ours(module, state) if isinstance(state, dict) else state


class StockReplica:
    """`module._replicate_for_data_parallel`: replicas have tensors of their own, hence run stock."""

    __slots__ = ("patched",)

    def __init__(self, patched: PatchedForward) -> None:
        self.patched = patched

    def __call__(self) -> nn.Module:
        module = self.patched.module
        replica: nn.Module = type(module)._replicate_for_data_parallel(module)
        replica.__dict__ = _without_ours(module, replica.__dict__)
        return replica


def _without_ours(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    names = {ANCHOR, REPLICATE}
    ours = anchored(module)
    if ours is not None and on_top(module, ours):
        names.add("forward")
    return {name: value for name, value in state.items() if name not in names}


def anchored(module: nn.Module) -> PatchedForward | None:
    """Our object for this module, live or not, on top or under a wrapper."""
    anchor = module.__dict__.get(ANCHOR)
    if type(anchor) is StockState and anchor.patched._module() is module:
        return anchor.patched
    return None


def on_top(module: nn.Module, ours: PatchedForward) -> bool:
    """Whether a call of the module meets `ours` first; accelerate's unwrap_model makes it a bound method."""
    forward = module.__dict__.get("forward")
    return forward is ours or getattr(forward, "__func__", None) is ours


def unlink(module: nn.Module) -> None:
    for name in ("forward", ANCHOR, REPLICATE):
        module.__dict__.pop(name, None)
