"""DistilBERT: BERT's arithmetic without token types and pooler, under names of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from clinfast.engine.spec import Dense, EncoderSpec, Match, Unsupported
from clinfast.models import bert, checks, heads
from clinfast.models.reader import Family, Reader

HOME = "transformers.models.distilbert.modeling_distilbert"
SELF_ATTENTION = ("DistilBertSelfAttention", "MultiHeadSelfAttention", "DistilBertSdpaAttention")


class DistilBertReader(Reader):
    """Walks a `DistilBertModel`; refuses what it does not know."""

    def __init__(self, model: Any, prefix: str, family: Family) -> None:
        super().__init__(prefix)
        checks.named(model.embeddings, self.at("embeddings"), HOME, "Embeddings")
        checks.named(model.transformer, self.at("transformer"), HOME, "Transformer")
        layers, path = model.transformer.layer, self.at("transformer.layer")
        checks.exact(layers, path, nn.ModuleList)
        if not len(layers):
            raise Unsupported(f"{path} is empty; at least one layer is needed")
        tables = self._embeddings(model.embeddings)
        read = [self._layer(layer, i, tables["hidden_size"], tables["eps"]) for i, layer in enumerate(layers)]
        self.spec = EncoderSpec(
            family=family.name, num_layers=len(layers), type_vocab_size=0, **tables, **self.same_layers(read, path)
        )

    def _embeddings(self, embeddings: Any) -> dict[str, Any]:
        path = self.at("embeddings")
        checks.exact(embeddings.dropout, f"{path}.dropout", nn.Dropout)
        hidden = checks.exact(embeddings.word_embeddings, f"{path}.word_embeddings", nn.Embedding).weight.shape[1]
        word = self.table("embedding.word", embeddings.word_embeddings, f"{path}.word_embeddings", hidden)
        position = self.table(
            "embedding.position", embeddings.position_embeddings, f"{path}.position_embeddings", hidden
        )
        eps = self.norm("embedding.norm", embeddings.LayerNorm, f"{path}.LayerNorm", hidden)
        self.default_ids(embeddings, path, position.shape[0])
        return {"vocab_size": word.shape[0], "max_positions": position.shape[0], "hidden_size": hidden, "eps": eps}

    def _layer(self, layer: Any, i: int, hidden: int, eps: float) -> dict[str, Any]:
        path, to = self.at(f"transformer.layer.{i}"), f"layers.{i}"
        checks.named(layer, path, HOME, "TransformerBlock")
        checks.named(layer.ffn, f"{path}.ffn", HOME, "FFN")
        attention = self._self_attention(layer.attention, f"{path}.attention", to, hidden)
        inner = checks.exact(layer.ffn.lin1, f"{path}.ffn.lin1", nn.Linear).out_features
        self.linear(f"{to}.ffn_in", layer.ffn.lin1, f"{path}.ffn.lin1", hidden, inner)
        self.linear(f"{to}.ffn_out", layer.ffn.lin2, f"{path}.ffn.lin2", inner, hidden)
        checks.exact(layer.ffn.dropout, f"{path}.ffn.dropout", nn.Dropout)
        self.norm(f"{to}.attention_norm", layer.sa_layer_norm, f"{path}.sa_layer_norm", hidden, eps)
        self.norm(f"{to}.output_norm", layer.output_layer_norm, f"{path}.output_layer_norm", hidden, eps)
        act = self.activation(layer.ffn, f"{path}.ffn", "activation")
        return {"intermediate_size": inner, "activation": act, **attention}

    def _self_attention(self, attention: Any, path: str, to: str, hidden: int) -> dict[str, Any]:
        checks.named(attention, path, HOME, *SELF_ATTENTION)
        checks.field(attention, path, "is_causal", (False,))
        for canonical, name in (
            ("query", "q_lin"), ("key", "k_lin"), ("value", "v_lin"), ("attention_output", "out_lin"),
        ):  # fmt: skip
            self.linear(f"{to}.{canonical}", getattr(attention, name), f"{path}.{name}", hidden, hidden)
        checks.exact(attention.dropout, f"{path}.dropout", nn.Dropout)
        self.constant(attention, "n_heads", "dim", "attention_head_size", "scaling", "is_causal")
        return self.heads(attention, path, attention.n_heads, attention.dim // attention.n_heads, hidden)


def base(model: Any, family: Family) -> Match:
    return family.read(model, "", family).match(heads.base_model(output="BaseModelOutput"))


def _classifier(model: Any, family: Family) -> tuple[Reader, Dense, Dense]:
    reader = family.base_of(model)
    checks.exact(model.dropout, "dropout", nn.Dropout)
    size = reader.spec.hidden_size
    dense = reader.dense("pooler", model.pre_classifier, "pre_classifier", size, activation="relu")
    return reader, dense, reader.dense("classifier", model.classifier, "classifier", dense.out_features)


def sequence_classification(model: Any, family: Family) -> Match:
    reader, dense, classifier = _classifier(model, family)
    return reader.match(heads.sequence_classifier(dense, classifier))


def multiple_choice(model: Any, family: Family) -> Match:
    reader, dense, classifier = _classifier(model, family)
    return reader.match(heads.multiple_choice(dense, bert.one_score(classifier, "classifier")))


def question_answering(model: Any, family: Family) -> Match:
    checks.exact(model.dropout, "dropout", nn.Dropout)
    return bert.question_answering(model, family)


def masked_lm(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    act = reader.activation(model, "model", "activation")
    first = reader.dense(
        "transform", model.vocab_transform, "vocab_transform", reader.spec.hidden_size, activation=act,
        norm=("vocab_layer_norm", model.vocab_layer_norm),
    )  # fmt: skip
    return reader.match(
        heads.masked_lm(first, reader.dense("decoder", model.vocab_projector, "vocab_projector", first.out_features))
    )


CLASSES = bert.classes(
    Family("distilbert", HOME, "DistilBert", "distilbert", DistilBertReader),
    Model=base,
    ForSequenceClassification=sequence_classification,
    ForTokenClassification=bert.token_classification,
    ForQuestionAnswering=question_answering,
    ForMultipleChoice=multiple_choice,
    ForMaskedLM=masked_lm,
)
