"""Who may ask for `attn_implementation="clinfast"`.

Where a model does not take its attention from the interface, transformers logs a line, or accepts the name and computes
what it always did. Neither must pass for our attention, so the three methods that take such a request ask here first.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

NAME = "clinfast"
_MARK = "_clinfast_stock"


# Code that computes something else for the name "sdpa" than for other names, so that our fallback would be wrong.
_BY_NAME = re.compile(
    r"""_attn_implementation\s*(==|!=|in|not in)\s[^\n]*["']sdpa["']"""
    r"""|_CLASSES\[(self\.)?config\._attn_implementation\]"""
)


def refuse(base: type, version: str | None, cls: Any) -> None:
    """Raises ValueError where a model of class `cls` would not get our attention, or not all that it needs besides;
    `version` is that of a transformers on which none does."""
    if version is not None:
        raise ValueError(
            f"attn_implementation='clinfast' takes effect on transformers 5 or later, and this is {version}; "
            "clinfast.optimize(model) serves this version"
        )
    known = [c for c in cls.__mro__ if issubclass(c, base) and c is not base]
    if not any(c._can_set_attn_implementation() for c in known):
        why = "it does not take its attention from transformers' attention interface"
    elif not cls._supports_sdpa:
        why = "transformers has no sdpa attention for it, so it needs more than softmax attention; use 'eager'"
    elif any(_depends_on_name(c.__module__) for c in known):
        why = "its code treats 'sdpa' unlike any other name; use 'sdpa'"
    else:
        return
    raise ValueError(f"attn_implementation='clinfast' cannot serve {cls.__name__}: {why}")


@functools.cache
def _depends_on_name(module: str) -> bool:
    try:
        return _BY_NAME.search(inspect.getsource(sys.modules[module])) is not None
    except (KeyError, OSError, TypeError):  # a class made at a prompt; those that it comes from have a source
        return False


def check(base: Any, version: str | None) -> None:
    """From now on `base`, which is `PreTrainedModel`, refuses as `refuse` says; again with the same effect."""
    refuse_class = functools.partial(refuse, base, version)
    methods = vars(base)

    def stock_of(name: str) -> Any:
        method = methods.get(name)
        method = getattr(method, "__func__", method)
        return getattr(method, _MARK, method)

    def replace(name: str, new: Any, stock: Any, wrap: Callable[[Any], Any] = lambda f: f) -> None:
        functools.update_wrapper(new, stock)
        setattr(new, _MARK, stock)
        setattr(base, name, wrap(new))

    correct = stock_of("get_correct_attn_implementation")
    if correct is not None:

        def get_correct(self: Any, requested_attention: Any, *args: Any, **kwargs: Any) -> Any:
            if requested_attention == NAME:
                refuse_class(type(self))
            return correct(self, requested_attention, *args, **kwargs)

        replace("get_correct_attn_implementation", get_correct, correct)

    set_live = stock_of("set_attn_implementation")
    if set_live is not None:

        def set_attn_implementation(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
            if attn_implementation == NAME:
                for module in self.modules():
                    if isinstance(module, base):
                        refuse_class(type(module))
            elif isinstance(attn_implementation, dict) and attn_implementation.get("") == NAME:
                refuse_class(type(self))
            found = set_live(self, attn_implementation, *args, **kwargs)
            if attn_implementation == NAME and self.config._attn_implementation != NAME:
                raise ValueError(f"transformers did not let {type(self).__name__} take attn_implementation='clinfast'")
            return found

        replace("set_attn_implementation", set_attn_implementation, set_live)

    automatic = stock_of("_autoset_attn_implementation")
    if automatic is not None:  # until 4.5x

        def autoset(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(config, "_attn_implementation_internal", None) == NAME:
                refuse_class(cls)
            return automatic(cls, config, *args, **kwargs)

        replace("_autoset_attn_implementation", autoset, automatic, classmethod)
