"""What an adapter may take for granted, each refused by name where it does not hold."""

from __future__ import annotations

from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clinfast.engine.spec import Unsupported

M = TypeVar("M", bound=nn.Module)

# What to do about a class that stands where another was expected, by the start of its module path.
_UNDO = {
    "peft.": "merge the adapter first: model = model.merge_and_unload()",
    "torchao.": "optimize a copy that is not quantized",
    "torch.ao.": "optimize a copy that is not quantized",
    "torch.nn.utils.parametrize": "make it permanent: torch.nn.utils.parametrize.remove_parametrizations",
    "bitsandbytes.": "load the model without quantization",
}


def foreign_forward(module: nn.Module) -> Any:
    """The forward that an instance carries itself, or None.

    transformers 4.5x leaves the bound method there after `output_hidden_states=True`; that counts as none.
    """
    forward = module.__dict__.get("forward")
    if isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward:
        return None
    return forward


def describe_forward(module: nn.Module) -> str:
    """Who put a forward on this instance."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        return f"an accelerate {type(hook).__name__}"
    forward = module.__dict__["forward"]
    return f"a {type(forward).__module__}.{type(forward).__qualname__}"


def plain_submodules(root: nn.Module) -> None:
    """Every submodule runs the forward of its class; what sits on `root` itself is the caller's business."""
    for path, module in root.named_modules():
        if module is root:
            continue
        if foreign_forward(module) is not None:
            raise Unsupported(
                f"{path} has a forward of its own ({describe_forward(module)}); remove it before optimize()"
            )
        if module.__dict__.get("_hf_hook") is not None:
            raise Unsupported(f"{path} has {describe_forward(module)}; remove it before optimize()")


def plain_parameters(root: nn.Module) -> None:
    """Every parameter is exactly `nn.Parameter`, floating, dense, with data; all share device and dtype."""
    first: tuple[str, Tensor] | None = None
    for path, parameter in root.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise Unsupported(f"{path} is {_name(parameter)}, not torch.nn.Parameter{_advice(parameter)}")
        if parameter.is_meta:
            raise Unsupported(f"{path} is on the meta device: the model is offloaded or was never loaded")
        if parameter.layout is not torch.strided or not parameter.is_floating_point():
            raise Unsupported(f"{path} is {parameter.layout} {parameter.dtype}; a dense floating tensor is needed")
        if first is None:
            first = path, parameter
        for field in ("device", "dtype"):
            here, there = getattr(parameter, field), getattr(first[1], field)
            if here != there:
                raise Unsupported(f"{path} has {field} {here} but {first[0]} has {there}; move them to one {field}")


def exact(module: Any, path: str, cls: type[M]) -> M:
    """`module`, which must be of class `cls` and not of a subclass."""
    if type(module) is not cls:
        raise Unsupported(f"{path} is {_name(module)}, not {cls.__module__}.{cls.__qualname__}{_advice(module)}")
    return module  # type: ignore[no-any-return]


def named(module: Any, path: str, home: str, *names: str) -> Any:
    """`module`, whose class must be one of `names` in the Python module `home`."""
    cls = type(module)
    if cls.__module__ != home or cls.__qualname__ not in names:
        raise Unsupported(f"{path} is {_name(module)}, not {home}.{names[0]}{_advice(module)}")
    return module


def one_of(module: Any, path: str, classes: tuple[tuple[str, str], ...]) -> Any:
    """`module`, whose class must be one of `classes`: Python module and name."""
    cls = type(module)
    if (cls.__module__, cls.__qualname__) not in classes:
        raise Unsupported(f"{path} is {_name(module)}, not {'.'.join(classes[0])}{_advice(module)}")
    return module


def padding_idx(embeddings: nn.Module, path: str) -> int:
    """The pad id from which positions are counted."""
    value = getattr(embeddings, "padding_idx", None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Unsupported(f"{path}.padding_idx is {value!r}; positions are counted from a pad id, an integer from 0 on")
    return value


def parameter(module: nn.Module, path: str, name: str, shape: tuple[int, ...]) -> None:
    """`module._parameters[name]` is there and has this shape."""
    tensor = module._parameters.get(name)
    if tensor is None:
        raise Unsupported(
            f"{path}.{name} is not a parameter of its module; if it is pruned, "
            "torch.nn.utils.prune.remove makes that permanent"
        )
    if tuple(tensor.shape) != shape:
        raise Unsupported(f"{path}.{name} has shape {list(tensor.shape)}; {list(shape)} is expected")


def has_bias(module: nn.Module) -> bool:
    """Whether a linear or LayerNorm has one; where it is None, it was made without."""
    return module._parameters.get("bias", module) is not None


def linear(module: Any, path: str, inputs: int, outputs: int, *, bare: bool = False) -> nn.Linear:
    """`bare`: it may have no bias."""
    exact(module, path, nn.Linear)
    parameter(module, path, "weight", (outputs, inputs))
    if not bare or has_bias(module):
        parameter(module, path, "bias", (outputs,))
    return module  # type: ignore[no-any-return]


def layer_norm(module: Any, path: str, size: int, eps: float | None = None, *, bare: bool = False) -> nn.LayerNorm:
    """`bare`: it may have no bias."""
    exact(module, path, nn.LayerNorm)
    parameter(module, path, "weight", (size,))
    if not bare or has_bias(module):
        parameter(module, path, "bias", (size,))
    if eps is not None and module.eps != eps:
        raise Unsupported(f"{path}.eps is {module.eps}; {eps} is expected, as in the encoder's other LayerNorms")
    return module  # type: ignore[no-any-return]


def embedding(module: Any, path: str, size: int) -> nn.Embedding:
    exact(module, path, nn.Embedding)
    if "weight" not in module._parameters:
        raise Unsupported(f"{path}.weight is not a parameter of its module")
    parameter(module, path, "weight", (module._parameters["weight"].shape[0], size))
    if module.max_norm is not None:
        raise Unsupported(f"{path}.max_norm is {module.max_norm}; None is needed, since it rewrites the weights")
    return module  # type: ignore[no-any-return]


def field(owner: Any, path: str, name: str, allowed: tuple[Any, ...]) -> None:
    """`owner.name`, where there is such a field, has one of the values that the arithmetic here covers."""
    value = getattr(owner, name, allowed[0])
    if value not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise Unsupported(f"{path}.{name} is {value!r}; only {choices} is served")


def _name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _advice(thing: Any) -> str:
    home = type(thing).__module__
    return next((f"; {advice}" for start, advice in _UNDO.items() if home.startswith(start)), "")
