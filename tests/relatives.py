"""Small random models of BERT's relatives, one recipe for all families and heads, and inputs that fit them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from bert_models import ids, randomize, right_padded
from torch import Tensor

VOCAB = 97
SPECIAL_IDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
# Class prefix, and the fields that only this family has.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta": ("Roberta", {"pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRoberta", {"pad_token_id": 1, "type_vocab_size": 1}),
    "camembert": ("Camembert", {"pad_token_id": 1, "type_vocab_size": 1}),
    "electra": ("Electra", {"embedding_size": 40}),
    "distilbert": ("DistilBert", {}),
    "albert": ("Albert", {"embedding_size": 40}),
    "ernie": ("Ernie", {"use_task_id": True}),
    "megatron-bert": ("MegatronBert", {}),
    "deberta-v2": (
        "DebertaV2",
        {
            "relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 8, "share_att_key": True,
            "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
        },
    ),
    "mpnet": ("MPNet", {}),
    "roberta-prelayernorm": ("RobertaPreLayerNorm", {"pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta-xl": ("XLMRobertaXL", {"pad_token_id": 1, "type_vocab_size": 1}),
    # A global layer, then two with a window that the 24 tokens of the tests do not fit, then a global one.
    "modernbert": ("ModernBert", {"num_hidden_layers": 4, "local_attention": 8, **SPECIAL_IDS}),
    "nomic-bert": ("NomicBert", {}),
}
# Some are newer than the oldest transformers that is served.
FAMILIES = {name: found for name, found in FAMILIES.items() if hasattr(transformers, f"{found[0]}Model")}
# What ModernBERT calls BERT's fields.
MODERNBERT_NAMES = {"hidden_act": "hidden_activation", "layer_norm_eps": "norm_eps"}
HEADS = {
    "base": "Model",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "qa": "ForQuestionAnswering",
    "choice": "ForMultipleChoice",
    "mlm": "ForMaskedLM",
    "nsp": "ForNextSentencePrediction",
    "pretraining": "ForPreTraining",
}
# Heads that not every family has; ELECTRA's pretraining is about tokens alone.
ONLY = {
    "nsp": ("ernie", "megatron-bert"),
    "pretraining": ("electra", "albert", "ernie", "megatron-bert"),
}
SENTENCE_LABELS = {
    "albert": "sentence_order_label",
    "ernie": "next_sentence_label",
    "megatron-bert": "next_sentence_label",
}
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
DISTILBERT_NAMES = {
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}
COUNTS_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "roberta-prelayernorm", "xlm-roberta-xl")
# Every pair of family and head that transformers has, bert aside.
PAIRS = [
    (family, head)
    for family in FAMILIES
    for head in HEADS
    if family in ONLY.get(head, FAMILIES) and hasattr(transformers, FAMILIES[family][0] + HEADS[head])
]


def reads_first_token(family: str, head: str) -> bool:
    if family == "modernbert":  # whose multiple choice looks for the first real token
        return head == "sequence"
    return head in ("sequence", "choice", "nsp") or (head == "pretraining" and family in SENTENCE_LABELS)


def model_class(family: str, head: str) -> Any:
    return getattr(transformers, FAMILIES[family][0] + HEADS[head])


def make(family: str, head: str = "base", *, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> Any:
    """An eval-mode model with every parameter random; fields have BERT's names in every family."""
    torch.manual_seed(seed)
    settings = {**COMMON, **FAMILIES[family][1], **fields}
    names = {"distilbert": DISTILBERT_NAMES, "modernbert": MODERNBERT_NAMES}.get(family, {})
    settings = {names.get(name, name): value for name, value in settings.items()}
    cls = model_class(family, head)
    model = cls(cls.config_class(**settings))
    randomize(model)
    return model.to(dtype).eval()


def batch_for(model: Any, mask: Tensor | None = None, *, batch: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """`batch` notes of up to 24 tokens, with token types where the family has them; pad ids stand among the tokens."""
    config = model.config
    seqlen = min(24, config.max_position_embeddings - 4)
    mask = right_padded([seqlen, 1, seqlen // 2, 7][:batch], seqlen) if mask is None else mask
    input_ids = ids(batch, mask.shape[1], seed=seed, vocab=config.vocab_size)
    found = {"input_ids": input_ids, "attention_mask": mask}
    if getattr(config, "type_vocab_size", 0):
        found["token_type_ids"] = input_ids % config.type_vocab_size
    return shaped(model, found)


def shaped(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same notes as [B / 2, 2, S] under a multiple choice head."""
    if not type(model).__name__.endswith("MultipleChoice"):
        return inputs
    return {name: value.view(-1, 2, value.shape[-1]) for name, value in inputs.items()}


def labels_for(family: str, head: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    batch, seqlen = inputs["input_ids"].shape[0], inputs["input_ids"].shape[-1]
    if head == "qa":
        return {"start_positions": torch.zeros(batch).long(), "end_positions": torch.ones(batch).long()}
    per_token = head in ("token", "mlm", "pretraining")
    found = {"labels": torch.ones((batch, seqlen) if per_token else (batch,), dtype=torch.long)}
    if head == "pretraining" and family in SENTENCE_LABELS:
        found[SENTENCE_LABELS[family]] = torch.ones(batch, dtype=torch.long)
    return found
