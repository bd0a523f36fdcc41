"""MPNet (BioLORD, all-mpnet-base-v2): BERT's layers under names of their own, RoBERTa's positions and heads, and one
table of biases by relative distance for all layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from clinfast.engine.relative_bias import bucket_of
from clinfast.engine.spec import Match, Unsupported
from clinfast.models import bert, checks, heads, roberta
from clinfast.models.reader import Family

HOME = "transformers.models.mpnet.modeling_mpnet"
# Stock's own constants, whatever config.relative_attention_num_buckets says: that only sizes the table.
BUCKETS, MAX_DISTANCE = 32, 128


class MPNetReader(bert.BertReader):
    """Walks an `MPNetModel`; refuses what it does not know."""

    def __init__(self, model: Any, prefix: str, family: Family) -> None:
        super().__init__(model, prefix, family, counts_positions=True)
        path = self.at("encoder.relative_attention_bias")
        table = self.table("relative_bias", model.encoder.relative_attention_bias, path, self.spec.num_heads)
        if table.shape[0] < BUCKETS:
            raise Unsupported(
                f"{path} has {table.shape[0]} rows; {BUCKETS} are needed, as many as stock's buckets, whatever "
                "config.relative_attention_num_buckets is"
            )
        distances = torch.arange(-2 * MAX_DISTANCE, 2 * MAX_DISTANCE + 1)
        expected = model.encoder.relative_position_bucket(distances, num_buckets=BUCKETS)
        if not torch.equal(bucket_of(distances, BUCKETS, MAX_DISTANCE), expected):
            raise Unsupported(f"{self.at('encoder.relative_position_bucket')} gives other buckets than are known")
        self.spec = dataclasses.replace(
            self.spec, relative_buckets=BUCKETS, relative_max_distance=MAX_DISTANCE, relative_rows=table.shape[0]
        )

    def _embeddings(self, embeddings: Any) -> dict[str, Any]:
        path = self.at("embeddings")
        checks.exact(embeddings.dropout, f"{path}.dropout", nn.Dropout)
        width = checks.exact(embeddings.word_embeddings, f"{path}.word_embeddings", nn.Embedding).weight.shape[1]
        word = self.table("embedding.word", embeddings.word_embeddings, f"{path}.word_embeddings", width)
        table = embeddings.position_embeddings
        position = self.table("embedding.position", table, f"{path}.position_embeddings", width)
        eps = self.norm("embedding.norm", embeddings.LayerNorm, f"{path}.LayerNorm", width)
        self.default_ids(embeddings, path, position.shape[0])
        sizes = {"vocab_size": word.shape[0], "max_positions": position.shape[0], "type_vocab_size": 0}
        return {"embedding_size": width, "eps": eps, **sizes}

    def _layer(self, layer: Any, i: int, hidden: int, eps: float) -> dict[str, Any]:
        path, to, check = self.at(f"encoder.layer.{i}"), f"layers.{i}", self.family.check
        check(layer, path, "Layer")
        check(layer.attention, f"{path}.attention", "Attention")
        attention = check(layer.attention.attn, f"{path}.attention.attn", "SelfAttention")
        check(layer.intermediate, f"{path}.intermediate", "Intermediate")
        check(layer.output, f"{path}.output", "Output")
        for canonical, name in (("query", "q"), ("key", "k"), ("value", "v"), ("attention_output", "o")):
            self.linear(f"{to}.{canonical}", getattr(attention, name), f"{path}.attention.attn.{name}", hidden, hidden)
        inner = checks.exact(layer.intermediate.dense, f"{path}.intermediate.dense", nn.Linear).out_features
        self.linear(f"{to}.ffn_in", layer.intermediate.dense, f"{path}.intermediate.dense", hidden, inner)
        self.linear(f"{to}.ffn_out", layer.output.dense, f"{path}.output.dense", inner, hidden)
        for canonical, name in (("attention_norm", "attention"), ("output_norm", "output")):
            owner = getattr(layer, name)
            self.norm(f"{to}.{canonical}", owner.LayerNorm, f"{path}.{name}.LayerNorm", hidden, eps)
            checks.exact(owner.dropout, f"{path}.{name}.dropout", nn.Dropout)
        checks.exact(attention.dropout, f"{path}.attention.attn.dropout", nn.Dropout)
        self.constant(attention, "num_attention_heads", "attention_head_size", "all_head_size")
        act = self.activation(layer.intermediate, f"{path}.intermediate", "intermediate_act_fn")
        sizes = attention.num_attention_heads, attention.attention_head_size, hidden
        return {
            "intermediate_size": inner, "activation": act, **self.heads(attention, f"{path}.attention.attn", *sizes),
        }  # fmt: skip


def base(model: Any, family: Family) -> Match:
    reader = family.read(model, "", family)
    pooled = None if model.pooler is None else reader.pooler(model, family)
    return reader.match(heads.base_model(pooled, output="BaseModelOutputWithPooling"))


CLASSES = bert.classes(
    Family("mpnet", HOME, "MPNet", "mpnet", MPNetReader),
    Model=base,
    ForSequenceClassification=roberta.sequence_classification,
    ForTokenClassification=bert.token_classification,
    ForQuestionAnswering=bert.question_answering,
    ForMultipleChoice=bert.multiple_choice,
    ForMaskedLM=roberta.masked_lm,
)
