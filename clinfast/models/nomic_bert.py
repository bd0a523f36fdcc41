"""Nomic BERT as transformers 5 has it: BERT's post-norm layers with rotary positions and a gated FFN, few biases."""

from __future__ import annotations

from typing import Any

from torch import nn

from clinfast.engine.spec import EncoderSpec, Match, Unsupported
from clinfast.models import bert, checks, heads
from clinfast.models.reader import Family, Reader

HOME = "transformers.models.nomic_bert.modeling_nomic_bert"
ATTENTION = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("attention_output", "o_proj"))


class NomicBertReader(Reader):
    """Walks a `NomicBertModel`; refuses what it does not know."""

    bare = True

    def __init__(self, model: Any, prefix: str, family: Family) -> None:
        super().__init__(prefix)
        self.family = family
        family.check(model.embeddings, self.at("embeddings"), "Embeddings")
        layers, path = checks.exact(model.layers, self.at("layers"), nn.ModuleList), self.at("layers")
        self.constant(model.config, "num_hidden_layers")
        if not len(layers) or model.config.num_hidden_layers != len(layers):
            raise Unsupported(
                f"{path} has {len(layers)} layers and config.num_hidden_layers is {model.config.num_hidden_layers}; "
                "they must agree, and not be 0"
            )
        tables = self._embeddings(model.embeddings, model.config.max_position_embeddings)
        read = [self._layer(layer, i, tables["hidden_size"], tables["eps"]) for i, layer in enumerate(layers)]
        rotation = self._rotation(model.rotary_emb, self.at("rotary_emb"), read[0]["head_dim"])
        self.spec = EncoderSpec(
            family=family.name,
            num_layers=len(layers),
            position_table=False,
            gated="apart",
            rotations=(rotation,) * len(layers),
            without_bias=self.without_bias(
                "embedding.norm", "query", "key", "value", "attention_output", "attention_norm", "ffn_in", "ffn_gate",
                "ffn_out", "output_norm",
            ),
            **tables,
            **self.same_layers(read, path),
        )  # fmt: skip

    def _embeddings(self, embeddings: Any, max_positions: int) -> dict[str, Any]:
        path = self.at("embeddings")
        checks.exact(embeddings.dropout, f"{path}.dropout", nn.Dropout)
        hidden = checks.exact(embeddings.word_embeddings, f"{path}.word_embeddings", nn.Embedding).weight.shape[1]
        sizes = {}
        for field, name in (("vocab_size", "word"), ("type_vocab_size", "token_type")):
            module, at = getattr(embeddings, f"{name}_embeddings"), f"{path}.{name}_embeddings"
            sizes[field] = self.table(f"embedding.{name}", module, at, hidden).shape[0]
        eps = self.norm("embedding.norm", embeddings.LayerNorm, f"{path}.LayerNorm", hidden)
        return {"hidden_size": hidden, "eps": eps, "max_positions": max_positions, **sizes}

    def _layer(self, layer: Any, i: int, hidden: int, eps: float) -> dict[str, Any]:
        path, to = self.at(f"layers.{i}"), f"layers.{i}"
        self.family.check(layer, path, "Layer")
        attention = self.family.check(layer.self_attn, f"{path}.self_attn", "Attention")
        checks.field(attention, f"{path}.self_attn", "is_causal", (False,))
        for canonical, name in ATTENTION:
            self.linear(f"{to}.{canonical}", getattr(attention, name), f"{path}.self_attn.{name}", hidden, hidden)
        for name in ("post_attention_dropout", "post_mlp_dropout"):
            checks.exact(getattr(layer, name), f"{path}.{name}", nn.Dropout)
        for canonical, name in (("attention_norm", "post_attention_layernorm"), ("output_norm", "post_mlp_layernorm")):
            self.norm(f"{to}.{canonical}", getattr(layer, name), f"{path}.{name}", hidden, eps)
        mlp = self.family.check(layer.mlp, f"{path}.mlp", "MLP")
        inner = checks.exact(mlp.down_proj, f"{path}.mlp.down_proj", nn.Linear).in_features
        for canonical, name, sizes in (
            ("ffn_in", "gate_proj", (hidden, inner)), ("ffn_gate", "up_proj", (hidden, inner)),
            ("ffn_out", "down_proj", (inner, hidden)),
        ):  # fmt: skip
            self.linear(f"{to}.{canonical}", getattr(mlp, name), f"{path}.mlp.{name}", *sizes)
        act = self.activation(mlp, f"{path}.mlp", "act_fn", silu=True)
        self.constant(attention, "head_dim", "scaling", "is_causal")
        found = self.heads(attention, f"{path}.self_attn", hidden // attention.head_dim, attention.head_dim, hidden)
        return {"intermediate_size": inner, "activation": act, **found}

    def _rotation(self, rotary: Any, path: str, head_dim: int) -> int:
        self.family.check(rotary, path, "RotaryEmbedding")
        checks.field(rotary, path, "rope_type", ("default",))
        checks.field(rotary, path, "attention_scaling", (1.0,))
        self.constant(rotary, "rope_type", "attention_scaling")
        return self.rotation(rotary, "inv_freq", path, head_dim)


def base(model: Any, family: Family) -> Match:
    reader = family.read(model, "", family)
    pooled = None if model.pooler is None else reader.pooler(model, family)
    return reader.match(heads.base_model(pooled, output="BaseModelOutputWithPooling"))


def masked_lm(model: Any, family: Family) -> Match:
    reader, path = family.base_of(model), "cls.predictions"
    family.check(model.cls, "cls", "OnlyMLMHead")
    predictions = family.check(model.cls.predictions, path, "LMPredictionHead")
    transform = family.check(predictions.transform, f"{path}.transform", "PredictionHeadTransform")
    act = reader.activation(transform, f"{path}.transform", "transform_act_fn", silu=True)
    first = bert.lm_transform(reader, transform, f"{path}.transform", act, "layer_norm")
    decoder = reader.dense("decoder", predictions.decoder, f"{path}.decoder", first.out_features)
    return reader.match(heads.masked_lm(first, decoder))


CLASSES = bert.classes(
    Family("nomic-bert", HOME, "NomicBert", "nomic_bert", NomicBertReader),
    Model=base,
    ForSequenceClassification=bert.sequence_classification,
    ForTokenClassification=bert.token_classification,
    ForMaskedLM=masked_lm,
)
