"""How a spec is run: op by op, in one call into C++, in a CUDA graph. Each gives the same results."""

from clinfast.engine.executors.eager import EagerExecutor
from clinfast.engine.executors.native import NativeExecutor

__all__ = ["EagerExecutor", "NativeExecutor"]
