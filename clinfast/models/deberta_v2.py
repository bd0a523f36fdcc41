"""DeBERTa v2 and v3: BERT's layers with disentangled attention, whose position projections are made when packed."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from clinfast.engine.spec import Dense, Disentangled, EncoderSpec, Match, Unsupported
from clinfast.models import bert, checks, heads
from clinfast.models.activations import activation
from clinfast.models.reader import Family, Reader
from clinfast.ops.attention_disentangled import position_scale

HOME = "transformers.models.deberta_v2.modeling_deberta_v2"
TERMS = ("c2p", "p2c")


class DebertaV2Reader(bert.BertReader):
    """Walks a `DebertaV2Model`; refuses what it does not know."""

    def __init__(self, model: Any, prefix: str, family: Family) -> None:
        Reader.__init__(self, prefix)
        self.family, self.norms = family, bert.BEHIND
        self.constant(model, "z_steps")
        checks.field(model, self.at("model"), "z_steps", (0, 1))
        encoder, path = family.check(model.encoder, self.at("encoder"), "Encoder"), self.at("encoder")
        family.check(model.embeddings, self.at("embeddings"), "Embeddings")
        if not len(checks.exact(encoder.layer, f"{path}.layer", nn.ModuleList)):
            raise Unsupported(f"{path}.layer is empty; at least one layer is needed")
        if encoder.conv is not None:
            raise Unsupported(f"{path}.conv is a convolution (conv_kernel_size); models without one are served")
        tables = self._embeddings(model.embeddings)
        hidden, eps = tables["embedding_size"], tables["eps"]
        layers = [self._layer(layer, i, hidden, eps) for i, layer in enumerate(encoder.layer)]
        common = self.same_layers(layers, f"{path}.layer")
        self.spec = EncoderSpec(
            family=family.name,
            num_layers=len(layers),
            hidden_size=hidden,
            disentangled=self._disentangled(encoder, path, common.pop("relative"), hidden, eps),
            **tables,
            **common,
        )

    def _embeddings(self, embeddings: Any) -> dict[str, Any]:
        path = self.at("embeddings")
        checks.exact(embeddings.dropout, f"{path}.dropout", nn.Dropout)
        self.constant(embeddings, "position_biased_input")
        if embeddings.embed_proj is not None:
            raise Unsupported(f"{path}.embed_proj is there (embedding_size); embeddings of hidden_size are served")
        width = checks.exact(embeddings.word_embeddings, f"{path}.word_embeddings", nn.Embedding).weight.shape[1]
        biased = bool(embeddings.position_biased_input)
        rows = {}
        for field, name, there in (
            ("vocab_size", "word", True),
            ("max_positions", "position", biased),
            ("type_vocab_size", "token_type", embeddings.token_type_embeddings is not None),
        ):
            module, at = getattr(embeddings, f"{name}_embeddings"), f"{path}.{name}_embeddings"
            rows[field] = self.table(f"embedding.{name}", module, at, width).shape[0] if there else 0
        eps = self.norm("embedding.norm", embeddings.LayerNorm, f"{path}.LayerNorm", width)
        self.default_ids(embeddings, path, rows["max_positions"] or embeddings.position_ids.shape[-1])
        return {"embedding_size": width, "eps": eps, "position_table": biased, **rows}

    def _self_attention(self, attention: Any, path: str, to: str, hidden: int) -> dict[str, Any]:
        checks.named(attention, path, self.family.home, "DisentangledSelfAttention")
        for name in ("query", "key", "value"):
            self.linear(f"{to}.{name}", getattr(attention, f"{name}_proj"), f"{path}.{name}_proj", hidden, hidden)
        checks.exact(attention.dropout, f"{path}.dropout", nn.Dropout)
        self.constant(
            attention, "num_attention_heads", "attention_head_size", "share_att_key", "pos_att_type",
            "relative_attention", "position_buckets", "max_relative_positions", "pos_ebd_size",
        )  # fmt: skip
        terms, odd = _terms(attention.pos_att_type)
        if odd:
            raise Unsupported(f"{path}.pos_att_type has {odd}; {' and '.join(TERMS)} are served")
        found = self.heads(attention, path, attention.num_attention_heads, attention.attention_head_size, hidden)
        # Stock counts the terms in its scale even where it has no relative attention.
        found |= {"scale": position_scale(found["head_dim"], len(terms)), "relative": None}
        if attention.relative_attention and terms:
            checks.exact(attention.pos_dropout, f"{path}.pos_dropout", nn.Dropout)
            shared = bool(attention.share_att_key)
            for term, name in (("c2p", "key"), ("p2c", "query")):
                if term in terms and not shared:
                    module, at = getattr(attention, f"pos_{name}_proj"), f"{path}.pos_{name}_proj"
                    self.linear(f"{to}.position_{name}", module, at, hidden, hidden)
            sizes = attention.pos_ebd_size, attention.position_buckets, attention.max_relative_positions
            found["relative"] = (terms, *sizes, shared)
        return found

    def _disentangled(self, encoder: Any, path: str, layers: Any, hidden: int, eps: float) -> Disentangled | None:
        self.constant(encoder, "relative_attention", "position_buckets", "max_relative_positions", "norm_rel_ebd")
        if layers is None:
            return None
        terms, span, buckets, reach, shared = layers
        buckets = max(buckets, 0)
        if (encoder.max_relative_positions, max(encoder.position_buckets, 0)) != (reach, buckets):
            raise Unsupported(f"{path} and its layers differ in max_relative_positions or position_buckets")
        if buckets and (buckets % 2 or not 2 <= buckets // 2 < reach - 1):
            raise Unsupported(
                f"{path}.position_buckets is {buckets} and max_relative_positions {reach}; an even number from 4 on, "
                "whose half is less than max_relative_positions - 1, is served"
            )
        if self.table("relative.table", encoder.rel_embeddings, f"{path}.rel_embeddings", hidden).shape[0] != 2 * span:
            raise Unsupported(f"{path}.rel_embeddings does not have {2 * span} rows")
        norm = "layer_norm" in encoder.norm_rel_ebd
        if norm:
            self.norm("relative.norm", encoder.LayerNorm, f"{path}.LayerNorm", hidden, eps)
        return Disentangled(terms, span, buckets, reach, shared, norm=norm)

    def pooler(self, model: Any, family: Family) -> Dense:
        """`ContextPooler`, which stands beside the base model."""
        pooler = checks.named(model.pooler, "pooler", family.home, "ContextPooler")
        checks.exact(pooler.dropout, "pooler.dropout", nn.Dropout)
        self.constant(pooler.config, "pooler_hidden_act")
        name = pooler.config.pooler_hidden_act
        module = importlib.import_module("transformers.activations").ACT2FN[name]
        act = "tanh" if type(module) is nn.Tanh else activation(module, "config.pooler_hidden_act")
        return self.dense("pooler", pooler.dense, "pooler.dense", self.spec.hidden_size, activation=act)

    def match(self, head: heads.Head) -> Match:
        # Stock multiplies the embeddings by the mask.
        return super().match(head)._replace(zero_or_one=True)


def _terms(names: Any) -> tuple[tuple[str, ...], list[str]]:
    return tuple(term for term in TERMS if term in names), sorted(set(names) - set(TERMS))


def base(model: Any, family: Family) -> Match:
    return family.read(model, "", family).match(heads.base_model(output="BaseModelOutput"))


def sequence_classification(model: Any, family: Family) -> Match:
    reader, pooled, classifier = _pooled(model, family)
    return reader.match(heads.sequence_classifier(pooled, classifier))


def multiple_choice(model: Any, family: Family) -> Match:
    reader, pooled, scorer = _pooled(model, family)
    return reader.match(heads.multiple_choice(pooled, bert.one_score(scorer, "classifier")))


def _pooled(model: Any, family: Family) -> tuple[Reader, Dense, Dense]:
    reader = family.base_of(model)
    pooled = reader.pooler(model, family)
    checks.exact(model.dropout, "dropout", nn.Dropout)
    return reader, pooled, reader.dense("classifier", model.classifier, "classifier", reader.spec.hidden_size)


def masked_lm(model: Any, family: Family) -> Match:
    """With the head of BERT's kind (`legacy`), or the one whose decoder is the word embeddings."""
    reader = family.base_of(model)
    reader.constant(model, "legacy")
    if model.legacy:
        return reader.match(heads.masked_lm(*_legacy_layers(reader, model, family)))
    path = "lm_predictions.lm_head"
    checks.named(model.lm_predictions, "lm_predictions", family.home, f"{family.prefix}OnlyMLMHead")
    head = checks.named(model.lm_predictions.lm_head, path, family.home, f"{family.prefix}LMPredictionHead")
    act = reader.activation(head, path, "transform_act_fn")
    first = bert.lm_transform(reader, head, path, act, "LayerNorm")
    word = getattr(model, family.base).embeddings.word_embeddings
    return reader.match(heads.masked_lm(first, reader.tied("decoder", word, head, path, first.out_features)))


def _legacy_layers(reader: Reader, model: Any, family: Family) -> tuple[Dense, Dense]:
    path, predictions = "cls.predictions", model.cls.predictions
    for module, at, name in (
        (model.cls, "cls", "OnlyMLMHead"),
        (predictions, path, "LMPredictionHead"),
        (predictions.transform, f"{path}.transform", "PredictionHeadTransform"),
    ):
        checks.named(module, at, family.home, f"Legacy{family.prefix}{name}")
    act = reader.activation(predictions.transform, f"{path}.transform", "transform_act_fn")
    first = bert.lm_transform(reader, predictions.transform, f"{path}.transform", act, "LayerNorm")
    return first, reader.dense("decoder", predictions.decoder, f"{path}.decoder", first.out_features)


HEADS = {
    "Model": base,
    "ForSequenceClassification": sequence_classification,
    "ForTokenClassification": bert.token_classification,
    "ForQuestionAnswering": bert.question_answering,
    "ForMultipleChoice": multiple_choice,
    "ForMaskedLM": masked_lm,
}
CLASSES = bert.classes(Family("deberta-v2", HOME, "DebertaV2", "deberta", DebertaV2Reader), **HEADS)
