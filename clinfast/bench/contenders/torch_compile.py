from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clinfast.bench.cells import Batch
from clinfast.bench.contenders.base import TorchContender


class TorchCompile(TorchContender):
    """Inductor with frozen weights, compiled for the very shape of each cell: the best case for it."""

    name = "torch_compile"
    distributions = ("torch", "transformers")
    compiles_at_first_call = True

    def prepare(self, batch: Batch) -> Callable[[], Any]:
        import torch
        import torch._inductor.config as inductor

        inductor.freezing = True
        torch._dynamo.reset()
        stock = self.model
        self.model = torch.compile(stock, dynamic=False)
        try:
            return super().prepare(batch)
        finally:
            self.model = stock
