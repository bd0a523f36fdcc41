"""The models that are timed: saved folders, what their linears cost, and the stock model in them."""

from __future__ import annotations

from typing import Any

from clinfast.bench import cache
from clinfast.model_folder import ModelFolder

PRECISIONS = ("fp32", "bf16")
# Their FFN has a second product of the first one's size.
GATED = ("modernbert", "nomic_bert")
WEIGHTS = ("*.safetensors", "*.bin")


class ModelSource(ModelFolder):
    """A saved Hugging Face folder as the harness sees it."""

    def gemm_flops(self, tokens: int) -> int:
        """FLOPs of the encoder's linears (no attention scores, no pooler) over `tokens` tokens."""
        hidden, inner = self.hidden_size, self.intermediate_size
        products = 3 if self.config.get("model_type") in GATED else 2
        return 2 * tokens * self.layers * (4 * hidden * hidden + products * hidden * inner)

    @property
    def identity(self) -> str:
        """Changes with the config and with any write to the weights."""
        files = sorted(file for pattern in WEIGHTS for file in self.folder.glob(pattern))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return cache.key(name=self.name, config=self.config, weights=stats)


def load_stock(source: ModelFolder, precision: str, attention: str | None = None) -> Any:
    """The stock model in eval mode, its weights rounded to `precision`; SDPA where its class has it, as by default."""
    import torch

    model = source.load_model(torch.float32, attn_implementation=attention)
    return model.to(torch.bfloat16) if precision == "bf16" else model
