"""ModernBERT: pre-norm, rotary positions, gated FFN, a sliding window in most layers, biases only if asked for."""

from __future__ import annotations

from typing import Any

from torch import nn

from clinfast.engine.spec import Dense, EncoderSpec, Match, Unsupported
from clinfast.models import bert, checks, heads
from clinfast.models.reader import Family, Reader

HOME = "transformers.models.modernbert.modeling_modernbert"
# Parts of an attention that are in its arithmetic, in transformers 4 or 5.
CONSTANTS = ("head_dim", "num_heads", "all_head_size", "local_attention", "sliding_window", "is_causal")
POOLING: dict[str, heads.NoteRows] = {"cls": "first_token", "mean": "mean"}


class ModernBertReader(Reader):
    """Walks a `ModernBertModel`; refuses what it does not know."""

    bare = True

    def __init__(self, model: Any, prefix: str, family: Family) -> None:
        super().__init__(prefix)
        self.family, path = family, self.at("embeddings")
        embeddings = family.check(model.embeddings, path, "Embeddings")
        checks.exact(embeddings.drop, f"{path}.drop", nn.Dropout)
        words = checks.exact(embeddings.tok_embeddings, f"{path}.tok_embeddings", nn.Embedding)
        hidden = words.weight.shape[1]
        word = self.table("embedding.word", words, f"{path}.tok_embeddings", hidden)
        eps = self.norm("embedding.norm", embeddings.norm, f"{path}.norm", hidden)
        layers, path = checks.exact(model.layers, self.at("layers"), nn.ModuleList), self.at("layers")
        if not len(layers):
            raise Unsupported(f"{path} is empty; at least one layer is needed")
        self.constant(model.config, "local_attention")
        read = [self._layer(layer, i, hidden, eps) for i, layer in enumerate(layers)]
        windows = [model.config.local_attention // 2 if self._is_local(layer) else -1 for layer in layers]
        rotations = [self._rotation(model, layer, f"{path}.{i}", hidden) for i, layer in enumerate(layers)]
        self.norm("final_norm", model.final_norm, self.at("final_norm"), hidden, eps)
        self.spec = EncoderSpec(
            family=family.name,
            num_layers=len(layers),
            hidden_size=hidden,
            eps=eps,
            vocab_size=word.shape[0],
            max_positions=model.config.max_position_embeddings,
            type_vocab_size=0,
            position_table=False,
            pre_norm=True,
            first_norm="layers.0.attention_norm.weight" in self.parameters,
            packed_qkv=True,
            gated="packed",
            windows=tuple(windows),
            rotations=tuple(rotations),
            without_bias=self.without_bias(
                "embedding.norm", "attention_norm", "qkv", "attention_output", "output_norm", "ffn_in", "ffn_out",
                "final_norm",
            ),
            **self.same_layers(read, path),
        )  # fmt: skip

    def _layer(self, layer: Any, i: int, hidden: int, eps: float) -> dict[str, Any]:
        path, to = self.at(f"layers.{i}"), f"layers.{i}"
        self.family.check(layer, path, "EncoderLayer")
        attention = self.family.check(layer.attn, f"{path}.attn", "Attention")
        checks.field(attention, f"{path}.attn", "is_causal", (False,))
        self.linear(f"{to}.qkv", attention.Wqkv, f"{path}.attn.Wqkv", hidden, 3 * hidden)
        self.linear(f"{to}.attention_output", attention.Wo, f"{path}.attn.Wo", hidden, hidden)
        dropouts = ((nn.Dropout.__module__, "Dropout"), (nn.Identity.__module__, "Identity"))
        checks.one_of(attention.out_drop, f"{path}.attn.out_drop", dropouts)
        if i or type(layer.attn_norm) is not nn.Identity:
            self.norm(f"{to}.attention_norm", layer.attn_norm, f"{path}.attn_norm", hidden, eps)
        self.norm(f"{to}.output_norm", layer.mlp_norm, f"{path}.mlp_norm", hidden, eps)
        mlp = self.family.check(layer.mlp, f"{path}.mlp", "MLP")
        checks.exact(mlp.drop, f"{path}.mlp.drop", nn.Dropout)
        inner = checks.exact(mlp.Wo, f"{path}.mlp.Wo", nn.Linear).in_features
        self.linear(f"{to}.ffn_in", mlp.Wi, f"{path}.mlp.Wi", hidden, 2 * inner)
        self.linear(f"{to}.ffn_out", mlp.Wo, f"{path}.mlp.Wo", inner, hidden)
        act = self.activation(mlp, f"{path}.mlp", "act", silu=True)
        self.constant(attention, *CONSTANTS)
        self.constant(layer, "attention_type")
        sizes = hidden // attention.head_dim, attention.head_dim, hidden
        return {"intermediate_size": inner, "activation": act, **self.heads(attention, f"{path}.attn", *sizes)}

    def _is_local(self, layer: Any) -> bool:
        if hasattr(layer, "attention_type"):  # transformers 5
            return bool(layer.attention_type == "sliding_attention")
        return bool(layer.attn.local_attention != (-1, -1))

    def _rotation(self, model: Any, layer: Any, path: str, hidden: int) -> int:
        """One rotary module has the frequencies of both kinds of layers in transformers 5, each layer its own in 4."""
        shared = hasattr(model, "rotary_emb")
        at = self.at("rotary_emb") if shared else f"{path}.attn.rotary_emb"
        rotary = self.family.check(model.rotary_emb if shared else layer.attn.rotary_emb, at, "RotaryEmbedding")
        kind = f"{layer.attention_type}_" if shared else ""
        types = rotary.rope_type if shared else {"": rotary.rope_type}
        if types.get(kind.removesuffix("_")) != "default":
            raise Unsupported(f"{at}.rope_type is {rotary.rope_type!r}; only 'default' is served")
        checks.field(rotary, at, f"{kind}attention_scaling", (1.0,))
        self.constant(rotary, "rope_type", f"{kind}attention_scaling")
        return self.rotation(rotary, f"{kind}inv_freq", at, layer.attn.head_dim)


def _head(model: Any, family: Family, *, dropout: bool = True) -> tuple[Reader, Dense]:
    """The dense layer, activation and LayerNorm before every output."""
    reader = family.base_of(model)
    head = family.check(model.head, "head", "PredictionHead")
    if dropout:
        checks.exact(model.drop, "drop", nn.Dropout)
    act = reader.activation(head, "head", "act")
    return reader, bert.lm_transform(reader, head, "head", act, "norm")


def _classifier(model: Any, family: Family) -> tuple[Reader, Dense, Dense]:
    reader, head = _head(model, family)
    return reader, head, reader.dense("classifier", model.classifier, "classifier", head.out_features)


def _pooling(reader: Reader, model: Any) -> heads.NoteRows:
    checks.field(model.config, "config", "classifier_pooling", tuple(POOLING))
    reader.constant(model.config, "classifier_pooling")
    return POOLING[model.config.classifier_pooling]


def base(model: Any, family: Family) -> Match:
    return family.read(model, "", family).match(heads.base_model(output="BaseModelOutput"))


def masked_lm(model: Any, family: Family) -> Match:
    reader, head = _head(model, family, dropout=False)
    return reader.match(heads.masked_lm(head, reader.dense("decoder", model.decoder, "decoder", head.out_features)))


def sequence_classification(model: Any, family: Family) -> Match:
    reader, *layers = _classifier(model, family)
    return reader.match(heads.sequence_classifier(*layers, rows=_pooling(reader, model)))


def token_classification(model: Any, family: Family) -> Match:
    reader, *layers = _classifier(model, family)
    return reader.match(heads.token_classifier(*layers))


def question_answering(model: Any, family: Family) -> Match:
    reader, head, spans = _classifier(model, family)
    return reader.match(heads.question_answering(head, bert.two_scores(spans, "classifier")))


def multiple_choice(model: Any, family: Family) -> Match:
    """Stock looks for the first real token here, where other heads take column 0."""
    reader, head, scorer = _classifier(model, family)
    rows = _pooling(reader, model)
    rows = "first_real_token" if rows == "first_token" else rows
    return reader.match(heads.multiple_choice(head, bert.one_score(scorer, "classifier"), rows=rows))


CLASSES = bert.classes(
    Family("modernbert", HOME, "ModernBert", "model", ModernBertReader),
    Model=base,
    ForSequenceClassification=sequence_classification,
    ForTokenClassification=token_classification,
    ForQuestionAnswering=question_answering,
    ForMultipleChoice=multiple_choice,
    ForMaskedLM=masked_lm,
)
