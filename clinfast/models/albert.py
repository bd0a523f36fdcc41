"""ALBERT: BERT's arithmetic under names of its own, with layers that share weights and a projected embedding."""

from __future__ import annotations

from typing import Any

from torch import nn

from clinfast.engine.spec import Dense, EncoderSpec, Match, Unsupported
from clinfast.models import bert, checks, heads
from clinfast.models.reader import Family, Reader

HOME = "transformers.models.albert.modeling_albert"
ATTENTION = ("AlbertAttention", "AlbertSdpaAttention")


class AlbertReader(bert.BertReader):
    """Walks an `AlbertModel`; refuses what it does not know."""

    def __init__(self, model: Any, prefix: str, family: Family) -> None:
        Reader.__init__(self, prefix)
        self.family, self.norms = family, bert.BEHIND
        family.check(model.embeddings, self.at("embeddings"), "Embeddings")
        encoder, path = family.check(model.encoder, self.at("encoder"), "Transformer"), self.at("encoder")
        groups = checks.exact(encoder.albert_layer_groups, f"{path}.albert_layer_groups", nn.ModuleList)
        order = self._order(encoder.config, f"{path}.config", len(groups))
        tables = self._embeddings(model.embeddings)
        mapping, width = encoder.embedding_hidden_mapping_in, tables["embedding_size"]
        hidden = checks.exact(mapping, f"{path}.embedding_hidden_mapping_in", nn.Linear).out_features
        self.linear("embedding.projection", mapping, f"{path}.embedding_hidden_mapping_in", width, hidden)
        layers: list[dict[str, Any]] = []
        sets: list[range] = []  # of each group
        for g, group in enumerate(groups):
            at = f"{path}.albert_layer_groups.{g}"
            family.check(group, at, "LayerGroup")
            inner = checks.exact(group.albert_layers, f"{at}.albert_layers", nn.ModuleList)
            sets.append(range(len(layers), len(layers) + len(inner)))
            layers += [
                self._albert_layer(layer, f"{at}.albert_layers.{i}", f"layers.{len(layers) + i}", hidden, tables["eps"])
                for i, layer in enumerate(inner)
            ]
        weights = tuple(i for g in order for i in sets[g])
        if not weights:
            raise Unsupported(f"{path} has no layers; at least one layer is needed")
        self.spec = EncoderSpec(
            family=family.name,
            num_layers=len(weights),
            hidden_size=hidden,
            projects_embedding=True,
            layer_weights=weights,
            **tables,
            **self.same_layers(layers, f"{path}.albert_layer_groups"),
        )

    def _order(self, config: Any, path: str, groups: int) -> list[int]:
        """The group of each step, as the stock forward takes it from the config at every call."""
        self.constant(config, "num_hidden_layers", "num_hidden_groups")
        steps, named = config.num_hidden_layers, config.num_hidden_groups
        order = [int(i / (steps / named)) for i in range(steps)]
        if set(order) != set(range(groups)):
            raise Unsupported(
                f"{path} has num_hidden_layers {steps} and num_hidden_groups {named}, but there are {groups} groups; "
                "each group must be used"
            )
        return order

    def _albert_layer(self, layer: Any, path: str, to: str, hidden: int, eps: float) -> dict[str, Any]:
        self.family.check(layer, path, "Layer")
        attention = checks.named(layer.attention, f"{path}.attention", HOME, *ATTENTION)
        checks.field(attention, f"{path}.attention", "position_embedding_type", ("absolute",))
        checks.field(attention, f"{path}.attention", "is_causal", (False,))
        for canonical, name in (("query", "query"), ("key", "key"), ("value", "value"), ("attention_output", "dense")):
            self.linear(f"{to}.{canonical}", getattr(attention, name), f"{path}.attention.{name}", hidden, hidden)
        for name in ("attention_dropout", "output_dropout"):
            checks.exact(getattr(attention, name), f"{path}.attention.{name}", nn.Dropout)
        self.norm(f"{to}.attention_norm", attention.LayerNorm, f"{path}.attention.LayerNorm", hidden, eps)
        inner = checks.exact(layer.ffn, f"{path}.ffn", nn.Linear).out_features
        self.linear(f"{to}.ffn_in", layer.ffn, f"{path}.ffn", hidden, inner)
        self.linear(f"{to}.ffn_out", layer.ffn_output, f"{path}.ffn_output", inner, hidden)
        self.norm(f"{to}.output_norm", layer.full_layer_layer_norm, f"{path}.full_layer_layer_norm", hidden, eps)
        act = self.activation(layer, path, "activation")
        self.constant(attention, "num_attention_heads", "attention_head_size", "scaling", "is_causal")
        sizes = attention.num_attention_heads, attention.attention_head_size, hidden
        return {"intermediate_size": inner, "activation": act, **self.heads(attention, f"{path}.attention", *sizes)}

    def pooler(self, model: Any, family: Family) -> Dense:
        checks.exact(model.pooler_activation, self.at("pooler_activation"), nn.Tanh)
        return self.dense("pooler", model.pooler, self.at("pooler"), self.spec.hidden_size, activation="tanh")


def base(model: Any, family: Family) -> Match:
    reader = family.read(model, "", family)
    pooled = None if model.pooler is None else reader.pooler(model, family)
    return reader.match(heads.base_model(pooled, output="BaseModelOutputWithPooling"))


def _lm_layers(reader: Reader, model: Any, family: Family) -> tuple[Dense, Dense]:
    path, predictions = "predictions", family.check(model.predictions, "predictions", "MLMHead")
    act = reader.activation(predictions, path, "activation")
    first = bert.lm_transform(reader, predictions, path, act, "LayerNorm")
    return first, reader.dense("decoder", predictions.decoder, f"{path}.decoder", first.out_features)


def masked_lm(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    return reader.match(heads.masked_lm(*_lm_layers(reader, model, family)))


def pretraining(model: Any, family: Family) -> Match:
    reader, path = family.base_of(model), "sop_classifier"
    head = family.check(model.sop_classifier, path, "SOPHead")
    checks.exact(head.dropout, f"{path}.dropout", nn.Dropout)
    order = reader.dense("sop_classifier", head.classifier, f"{path}.classifier", reader.spec.hidden_size)
    layers, sentences = _lm_layers(reader, model, family), (reader.pooler(model.albert, family), order)
    return reader.match(heads.pretraining(HOME, "AlbertForPreTrainingOutput", layers, sentences, "sop_logits"))


OWN = {"Model": base, "ForMaskedLM": masked_lm, "ForPreTraining": pretraining}
SHARED = {name: head for name, head in bert.HEADS.items() if name != "ForNextSentencePrediction"}
CLASSES = bert.classes(Family("albert", HOME, "Albert", "albert", AlbertReader), **SHARED | OWN)
