from __future__ import annotations

from clinfast.bench.contenders.base import TorchContender


class Stock(TorchContender):
    """transformers as it comes: Python modules with SDPA attention."""

    name = "stock"
    distributions = ("transformers", "torch")
