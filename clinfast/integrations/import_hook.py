"""Run something once, right after a module was imported by whoever needs it, without importing it ourselves."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


def when_imported(name: str, action: Action) -> None:
    """Call `action(module)` now if the module `name` is imported, else when it is.

    Until then one finder sits in `sys.meta_path`; it goes once the module was executed, and stays if that failed, for
    the next try. The module keeps its own loader and spec. A loader that cannot be wrapped (one without `exec_module`)
    is left alone, and `action` is not called.
    """
    finder: Any = _Finder(name, action)
    sys.meta_path.insert(0, finder)
    module = sys.modules.get(name)  # asked after the insertion, or another thread's import could slip through between
    if module is None:
        return
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)
    if _is_initializing(module):
        # By another thread, which this waits for, or further up in this one, where nothing is to be done.
        module = importlib.import_module(name)
    if not _is_initializing(module):
        action(module)


def _is_initializing(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class _Finder:
    is_clinfast = True

    def __init__(self, name: str, action: Action) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            if find is None or getattr(finder, "is_clinfast", False):
                continue
            spec: ModuleSpec | None = find(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec, self)  # type: ignore[assignment]
                return spec
        return None


def _same(loader: Any) -> Any:
    return loader


class _Loader:
    """Stands in for the module's loader up to the moment that the module runs."""

    def __init__(self, spec: ModuleSpec, finder: _Finder) -> None:
        self._loader: Any = spec.loader
        self._spec, self._finder = spec, finder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)  # also what `copy` and `pickle` ask a half-made object
        return getattr(self._loader, name)

    def __reduce__(self) -> Any:
        return _same, (self._loader,)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        create = getattr(self._loader, "create_module", None)
        made: ModuleType | None = None if create is None else create(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        # Before the module runs, so that its code, `inspect`, pickled specs and `reload` see its own loader.
        self._spec.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        if module.__spec__ is not None and module.__spec__.loader is self:  # type: ignore[comparison-overlap]
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        finder: Any = self._finder
        if finder in sys.meta_path and sys.modules.get(finder.name) is module:
            sys.meta_path.remove(finder)
            finder.action(module)
