"""What a module looked like when its forward was replaced, and what of that has changed since.

The fast path skips every submodule, so each thing that could make one of them compute something else is
compared at every call: children, classes, parameters, constants, hooks, training flags, forwards of their
own, the config. Comparing two lists or dicts runs in C and stops at equal identities; for BERT-base the whole
takes about 20 us, where one walk of `modules()` takes 150.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, getitem, itemgetter
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from clinfast.engine.spec import Match
from clinfast.models.checks import foreign_forward
from clinfast.reason import AGAIN, Reason

ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "clinfast")

_forward_of: Callable[[type], Any] = attrgetter("forward")
_training_of: Callable[[dict[str, Any]], bool] = itemgetter("training")


def config_reason(config: Any) -> Reason | None:
    """Why calls under this config run stock; read by attribute, as the stock forward reads it."""
    for name in ("output_attentions", "output_hidden_states", "output_cross_attentions"):
        if getattr(config, name, None):
            return Reason(f"config.{name} is set", f"set config.{name} = False")
    if not getattr(config, "return_dict", True) or getattr(config, "torchscript", False):
        return Reason("config.return_dict is False", "set config.return_dict = True")
    for name in ("is_decoder", "is_causal"):
        if getattr(config, name, None):
            return Reason(f"config.{name} is set", "only encoders are served")
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ATTENTIONS:
        return Reason(
            f"config._attn_implementation is {attention!r}",
            "an attention of one's own may compute anything; set it back to 'sdpa'",
        )
    return None


def is_capture_hook(hook: Any) -> bool:
    """transformers installs these for good at the first `output_hidden_states=True`; else they do nothing."""
    return (
        getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
        and getattr(hook, "__name__", None) == "output_capturing_hook"
    )


class _Accepted(NamedTuple):
    """What may change without harm, as last looked at; replaced as a whole, since other threads read it.

    `hooks_made` is torch's count of hooks ever registered in this process: while it stands still, a submodule
    that never had a hook has none. `odd` holds those that had one, or have a harmless forward of their own:
    `__dict__`, hooks, forward.
    """

    parameters: list[dict[str, Any]]
    config: Any
    configs: list[tuple[dict[str, Any], dict[str, Any]]]
    config_reason: Reason | None
    hooks_made: int
    ever_hooked: int
    plain: list[dict[str, Any]]
    odd: list[tuple[dict[str, Any], dict[Any, Any], Any]]


class Snapshot:
    """The module's structure at bind. Holds submodules and dicts, not the module itself or its `__dict__`."""

    def __init__(self, module: nn.Module, match: Match) -> None:
        named = list(module.named_modules())
        self.paths = [path for path, _ in named]
        self.submodules = [sub for _, sub in named[1:]]
        self.dicts = [sub.__dict__ for sub in self.submodules]
        self.types = [type(sub) for sub in self.submodules]
        self.classes = list(dict.fromkeys(self.types))
        self.class_forwards = list(map(_forward_of, self.classes))
        self.parent_paths, self.children = _paths_and(named, "_modules")
        self.children_then = [dict(d) for d in self.children]
        self.owner_paths, self.parameters = _paths_and(named, "_parameters")
        with_dropout = [
            (path, sub.__dict__)
            for path, sub in named[1:]
            if any(isinstance(near, _DropoutNd) for near in (sub, *sub._modules.values()))
        ]
        self.dropout_paths, self.dropouts = [path for path, _ in with_dropout], [d for _, d in with_dropout]
        self.ever_hooked: set[int] = set()
        constants = [(sub.__dict__, name) for sub, name in match.constants]
        constants += [(d, "config") for d in self.dicts if "config" in d]
        self.constant_owners = [d for d, _ in constants]
        self.constant_names = [name for _, name in constants]
        self.constants_then = list(map(getitem, self.constant_owners, self.constant_names))
        self.tables = [
            ref.module._parameters
            for name, ref in match.parameters.items()
            if name.startswith("embedding.") and not name.startswith("embedding.norm")
        ]
        self.rows_then = self._rows()
        self.accepted = self._accept(module)

    def _rows(self) -> list[int]:
        return [d["weight"].shape[0] for d in self.tables]  # type: ignore[union-attr]

    def _accept(self, module: nn.Module) -> _Accepted:
        config = module.__dict__.get("config")
        configs = [config] + [d["config"] for d in self.dicts if "config" in d]
        distinct = list({id(c): c for c in configs if c is not None}.values())
        hooks_made = RemovableHandle.next_id
        self.ever_hooked.update(i for i, d in enumerate(self.dicts) if d["_forward_hooks"] or d["_forward_pre_hooks"])
        plain, odd = [], []
        for i, (sub, d) in enumerate(zip(self.submodules, self.dicts, strict=True)):
            if i in self.ever_hooked or "forward" in d:
                harmless = {key: hook for key, hook in d["_forward_hooks"].items() if is_capture_hook(hook)}
                odd.append((d, harmless, d.get("forward") if foreign_forward(sub) is None else None))
            else:
                plain.append(d)
        return _Accepted(
            parameters=[dict(d) for d in self.parameters],
            config=config,
            configs=[(c.__dict__, dict(c.__dict__)) for c in distinct],
            config_reason=next((found for c in distinct if (found := config_reason(c)) is not None), None),
            hooks_made=hooks_made,
            ever_hooked=len(self.ever_hooked),
            plain=plain,
            odd=odd,
        )

    def reason(self, module: nn.Module) -> Reason | None:
        """Why the fast path would compute something else than the module now does, or None."""
        accepted = self.accepted
        if accepted.hooks_made != RemovableHandle.next_id:
            accepted = self._look_for_hooks(accepted)
        try:
            same = self._same(module, accepted)
        except Exception:  # a replaced parameter was compared with `==`, which tensors answer elementwise
            same = False
        if not same:
            accepted = self._accept(module)
            found = self._difference(self.accepted.parameters)
            if found is not None:
                return found
            self.accepted = accepted
        return accepted.config_reason

    def _look_for_hooks(self, accepted: _Accepted) -> _Accepted:
        """Hooks were registered somewhere in the process; take note if none of them is below the forward."""
        hooks_made = RemovableHandle.next_id
        if accepted.ever_hooked != len(self.ever_hooked):
            return accepted
        for d in accepted.plain:
            if d["_forward_hooks"] or d["_forward_pre_hooks"]:
                return accepted
        self.accepted = accepted = accepted._replace(hooks_made=hooks_made)
        return accepted

    def _same(self, module: nn.Module, accepted: _Accepted) -> bool:
        for d in accepted.plain:
            if "forward" in d:
                return False
        for d, hooks, forward in accepted.odd:
            if d["_forward_hooks"] != hooks or d["_forward_pre_hooks"] or d.get("forward") is not forward:
                return False
        for now, then in accepted.configs:
            if now != then:
                return False
        return (
            accepted.hooks_made == RemovableHandle.next_id
            and not any(map(_training_of, self.dropouts))
            and self.children == self.children_then
            and list(map(type, self.submodules)) == self.types
            and self.parameters == accepted.parameters
            and list(map(getitem, self.constant_owners, self.constant_names)) == self.constants_then
            and list(map(_forward_of, self.classes)) == self.class_forwards
            and self._rows() == self.rows_then
            and module.__dict__.get("config") is accepted.config
            and not nn_module._global_forward_hooks
            and not nn_module._global_forward_pre_hooks
        )

    def _difference(self, parameters_then: list[dict[str, Any]]) -> Reason | None:
        """What `_same` saw, in words; None where it does no harm."""
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return Reason("a global module hook is registered", "remove it to get the fast path")
        for path, now, then in zip(self.parent_paths, self.children, self.children_then, strict=True):
            if now != then:
                return Reason(f"a submodule of {path or 'the model'} was replaced after optimize()", AGAIN)
        for path, sub, cls in zip(self.paths[1:], self.submodules, self.types, strict=True):
            if type(sub) is not cls:
                return Reason(f"{path} changed its class after optimize()", AGAIN)
        for cls, forward in zip(self.classes, self.class_forwards, strict=True):
            if cls.forward is not forward:
                return Reason(f"{cls.__qualname__}.forward was replaced after optimize()", AGAIN)
        for path, now, then in zip(self.owner_paths, self.parameters, parameters_then, strict=True):
            found = _parameter_difference(path or "the model", now, then)
            if found is not None:
                return found
        if self._rows() != self.rows_then:
            return Reason("an embedding table was resized after optimize()", AGAIN)
        return self._submodule_difference()

    def _submodule_difference(self) -> Reason | None:
        owners = {id(d): path for path, d in zip(self.paths[1:], self.dicts, strict=True)}
        for d, name, then in zip(self.constant_owners, self.constant_names, self.constants_then, strict=True):
            now = d.get(name)
            if now is not then and now != then:  # a config compares its fields even with itself
                return Reason(f"{owners.get(id(d), 'config')}.{name} was changed after optimize()", AGAIN)
        for path, d in zip(self.dropout_paths, self.dropouts, strict=True):
            if d["training"]:
                return Reason(f"{path} is in training mode", "call model.eval() for inference", dirties=True)
        for path, sub, d in zip(self.paths[1:], self.submodules, self.dicts, strict=True):
            if d["_forward_pre_hooks"] or not all(map(is_capture_hook, d["_forward_hooks"].values())):
                return Reason(f"{path} has a forward hook", "the fast path skips submodules; remove the hook")
            if foreign_forward(sub) is not None:
                return Reason(f"{path} has a forward of its own", "the fast path skips submodules; remove it")
        return None


def _paths_and(named: list[tuple[str, nn.Module]], field: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The modules whose dict `field` is not empty: their paths, and those dicts."""
    full = [(path, getattr(sub, field)) for path, sub in named if getattr(sub, field)]
    return [path for path, _ in full], [d for _, d in full]


def _parameter_difference(where: str, now: dict[str, Any], then: dict[str, Any]) -> Reason | None:
    if now.keys() != then.keys():
        return Reason(f"parameters of {where} were added or removed", "make pruning permanent first")
    for name, parameter in now.items():
        if parameter is then[name]:
            continue
        if type(parameter) is not nn.Parameter:
            kind = type(parameter).__name__
            return Reason(f"{where}.{name} is a {kind}, not an nn.Parameter", "put plain parameters back")
        if then[name] is None or parameter.shape != then[name].shape:
            return Reason(f"{where}.{name} changed its shape after optimize()", AGAIN)
    return None
