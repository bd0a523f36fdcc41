"""BERT, and the reader of its relatives that share its module names.

Sizes, heads and epsilon are read from the modules, which is what runs: a config can disagree with them after
head pruning, truncation or an edit. Module names are the same from transformers 4.25 to 5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from clinfast.engine.spec import Dense, EncoderSpec, HeadActivation, Match, Unsupported
from clinfast.models import checks, heads
from clinfast.models.reader import Family, Reader

SELF_ATTENTION = ("SelfAttention", "SdpaSelfAttention")


class Norms(NamedTuple):
    """Where a family has its LayerNorms.

    Args:
        attention, output: paths below a layer.
        embedding: whether the embeddings end in one.
        final: path below the model of the one after the last layer; a family that has it is pre-norm, and its layers'
            LayerNorms stand before attention and FFN.
    """

    attention: str = "attention.output.LayerNorm"
    output: str = "output.LayerNorm"
    embedding: bool = True
    final: str = ""


BEHIND = Norms()


class BertReader(Reader):
    """Walks a base model with BERT's module names; refuses what it does not know.

    Args:
        norms: where the LayerNorms are.
        counts_positions: positions are the running count of ids other than the pad id, from the pad id + 1 on.
        projects_embedding: a linear stands between embeddings and layers where their widths differ.
    """

    def __init__(
        self,
        model: Any,
        prefix: str,
        family: Family,
        *,
        counts_positions: bool = False,
        projects_embedding: bool = False,
        norms: Norms = BEHIND,
    ) -> None:
        super().__init__(prefix)
        self.family, self.norms = family, norms
        for name in ("is_decoder", "add_cross_attention"):
            checks.field(model.config, self.at("config"), name, (False,))
        family.check(model.embeddings, self.at("embeddings"), "Embeddings")
        family.check(model.encoder, self.at("encoder"), "Encoder")
        checks.exact(model.encoder.layer, self.at("encoder.layer"), nn.ModuleList)
        if not len(model.encoder.layer):
            raise Unsupported(f"{self.at('encoder.layer')} is empty; at least one layer is needed")
        tables = self._embeddings(model.embeddings)
        hidden = width = tables["embedding_size"]
        if projects_embedding and getattr(model, "embeddings_project", None) is not None:
            project = checks.exact(model.embeddings_project, self.at("embeddings_project"), nn.Linear)
            hidden = project.out_features
            self.linear("embedding.projection", project, self.at("embeddings_project"), width, hidden)
            if hidden == width:
                raise Unsupported(f"{self.at('embeddings_project')} does not change the size {width}")
        eps = tables["eps"]
        if norms.final:
            path = self.at(norms.final)
            tables["eps"] = eps = self.norm("final_norm", model.get_submodule(norms.final), path, hidden, eps)
        layers = [self._layer(layer, i, hidden, eps) for i, layer in enumerate(model.encoder.layer)]
        if counts_positions:
            padding_idx = checks.padding_idx(model.embeddings, self.at("embeddings"))
            self.constant(model.embeddings, "padding_idx")
            tables |= {"position_padding_idx": padding_idx, "position_offset": padding_idx + 1}
        self.spec = EncoderSpec(
            family=family.name,
            num_layers=len(layers),
            hidden_size=hidden,
            embedding_norm=norms.embedding,
            pre_norm=bool(norms.final),
            **tables,
            **self.same_layers(layers, self.at("encoder.layer")),
        )

    def _embeddings(self, embeddings: Any) -> dict[str, Any]:
        path = self.at("embeddings")
        checks.field(embeddings, path, "position_embedding_type", ("absolute",))
        checks.exact(embeddings.dropout, f"{path}.dropout", nn.Dropout)
        width = checks.exact(embeddings.word_embeddings, f"{path}.word_embeddings", nn.Embedding).weight.shape[1]
        rows = {}
        for field, name in (("vocab_size", "word"), ("max_positions", "position"), ("type_vocab_size", "token_type")):
            attribute = f"{name}_embeddings"
            table = self.table(f"embedding.{name}", getattr(embeddings, attribute), f"{path}.{attribute}", width)
            rows[field] = table.shape[0]
        eps = None
        if self.norms.embedding:
            eps = self.norm("embedding.norm", embeddings.LayerNorm, f"{path}.LayerNorm", width)
        self.default_ids(embeddings, path, rows["max_positions"])
        return {"embedding_size": width, "eps": eps, **rows}

    def _layer(self, layer: Any, i: int, hidden: int, eps: float) -> dict[str, Any]:
        path, to, check = self.at(f"encoder.layer.{i}"), f"layers.{i}", self.family.check
        check(layer, path, "Layer")
        check(layer.attention, f"{path}.attention", "Attention")
        check(layer.attention.output, f"{path}.attention.output", "SelfOutput")
        check(layer.intermediate, f"{path}.intermediate", "Intermediate")
        check(layer.output, f"{path}.output", "Output")
        for name in ("is_decoder", "add_cross_attention"):
            checks.field(layer, path, name, (False,))
        attention = self._self_attention(layer.attention.self, f"{path}.attention.self", to, hidden)
        inner = checks.exact(layer.intermediate.dense, f"{path}.intermediate.dense", nn.Linear).out_features
        for canonical, module, name, sizes in (
            ("attention_output", layer.attention.output.dense, "attention.output.dense", (hidden, hidden)),
            ("ffn_in", layer.intermediate.dense, "intermediate.dense", (hidden, inner)),
            ("ffn_out", layer.output.dense, "output.dense", (inner, hidden)),
        ):
            self.linear(f"{to}.{canonical}", module, f"{path}.{name}", *sizes)
        for canonical, name in (("attention_norm", self.norms.attention), ("output_norm", self.norms.output)):
            self.norm(f"{to}.{canonical}", layer.get_submodule(name), f"{path}.{name}", hidden, eps)
        for owner, name in ((layer.attention.output, "attention.output"), (layer.output, "output")):
            if "dropout" in owner._modules:
                checks.exact(owner.dropout, f"{path}.{name}.dropout", nn.Dropout)
        act = self.activation(layer.intermediate, f"{path}.intermediate", "intermediate_act_fn")
        return {"intermediate_size": inner, "activation": act, **attention}

    def _self_attention(self, attention: Any, path: str, to: str, hidden: int) -> dict[str, Any]:
        self.family.check(attention, path, *SELF_ATTENTION)
        checks.field(attention, path, "position_embedding_type", ("absolute",))
        for name in ("is_decoder", "is_causal"):
            checks.field(attention, path, name, (False,))
        for name in ("query", "key", "value"):
            self.linear(f"{to}.{name}", getattr(attention, name), f"{path}.{name}", hidden, hidden)
        checks.exact(attention.dropout, f"{path}.dropout", nn.Dropout)
        self.constant(attention, "num_attention_heads", "attention_head_size", "scaling", "is_causal")
        return self.heads(attention, path, attention.num_attention_heads, attention.attention_head_size, hidden)


def lm_transform(reader: Reader, transform: Any, path: str, act: HeadActivation, norm: str) -> Dense:
    """The dense layer, activation and LayerNorm before a decoder."""
    behind = (f"{path}.{norm}", getattr(transform, norm))
    return reader.dense(
        "transform", transform.dense, f"{path}.dense", reader.spec.hidden_size, activation=act, norm=behind
    )


def base(model: Any, family: Family) -> Match:
    reader = family.read(model, "", family)
    pooled = None if getattr(model, "pooler", None) is None else reader.pooler(model, family)
    return reader.match(heads.base_model(pooled))


def sequence_classification(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    pooled = reader.pooler(getattr(model, family.base), family)
    checks.exact(model.dropout, "dropout", nn.Dropout)
    classifier = reader.dense("classifier", model.classifier, "classifier", reader.spec.hidden_size)
    return reader.match(heads.sequence_classifier(pooled, classifier))


def token_classification(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    checks.exact(model.dropout, "dropout", nn.Dropout)
    return reader.match(
        heads.token_classifier(reader.dense("classifier", model.classifier, "classifier", reader.spec.hidden_size))
    )


def question_answering(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    spans = reader.dense("qa_outputs", model.qa_outputs, "qa_outputs", reader.spec.hidden_size)
    return reader.match(heads.question_answering(two_scores(spans, "qa_outputs")))


def multiple_choice(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    pooled = reader.pooler(getattr(model, family.base), family)
    checks.exact(model.dropout, "dropout", nn.Dropout)
    scorer = reader.dense("classifier", model.classifier, "classifier", reader.spec.hidden_size)
    return reader.match(heads.multiple_choice(pooled, one_score(scorer, "classifier")))


def two_scores(dense: Dense, path: str) -> Dense:
    if dense.out_features != 2:
        raise Unsupported(f"{path} has {dense.out_features} outputs; 2 are needed, a start and an end")
    return dense


def one_score(dense: Dense, path: str) -> Dense:
    if dense.out_features != 1:
        raise Unsupported(f"{path} has {dense.out_features} outputs; 1 is needed, a score for each text")
    return dense


def _lm_layers(reader: Reader, predictions: Any, family: Family) -> tuple[Dense, Dense]:
    path, transform = "cls.predictions", predictions.transform
    family.check(predictions, path, "LMPredictionHead")
    family.check(transform, f"{path}.transform", "PredictionHeadTransform")
    act = reader.activation(transform, f"{path}.transform", "transform_act_fn")
    first = lm_transform(reader, transform, f"{path}.transform", act, "LayerNorm")
    return first, reader.dense("decoder", predictions.decoder, f"{path}.decoder", first.out_features)


def masked_lm(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    family.check(model.cls, "cls", "OnlyMLMHead")
    return reader.match(heads.masked_lm(*_lm_layers(reader, model.cls.predictions, family)))


def _relationship(reader: Reader, model: Any, family: Family) -> tuple[Dense, Dense]:
    pooled = reader.pooler(getattr(model, family.base), family)
    path = "cls.seq_relationship"
    return pooled, reader.dense("seq_relationship", model.cls.seq_relationship, path, reader.spec.hidden_size)


def next_sentence_prediction(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    family.check(model.cls, "cls", "OnlyNSPHead")
    return reader.match(heads.next_sentence(*_relationship(reader, model, family)))


def pretraining(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    family.check(model.cls, "cls", "PreTrainingHeads")
    lm = _lm_layers(reader, model.cls.predictions, family)
    output = f"{family.prefix}ForPreTrainingOutput"
    return reader.match(heads.pretraining(family.home, output, lm, _relationship(reader, model, family)))


def classes(family: Family, **recognisers: Callable[[Any, Family], Match]) -> dict[str, Callable[[Any], Match]]:
    """Class name -> function(module); `recognisers` are keyed by what follows the family's prefix."""
    return {family.prefix + name: _of(family, recognise) for name, recognise in recognisers.items()}


def _of(family: Family, recognise: Callable[[Any, Family], Match]) -> Callable[[Any], Match]:
    return lambda model: recognise(model, family)


HEADS = {
    "Model": base,
    "ForSequenceClassification": sequence_classification,
    "ForTokenClassification": token_classification,
    "ForQuestionAnswering": question_answering,
    "ForMultipleChoice": multiple_choice,
    "ForMaskedLM": masked_lm,
    "ForNextSentencePrediction": next_sentence_prediction,
    "ForPreTraining": pretraining,
}
CLASSES = classes(Family("bert", "transformers.models.bert.modeling_bert", "Bert", "bert", BertReader), **HEADS)
