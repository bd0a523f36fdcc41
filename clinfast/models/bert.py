"""BERT: `BertModel`, `BertForSequenceClassification`, `BertForTokenClassification`.

Sizes, heads and epsilon are read from the modules, which is what runs: a config can disagree with them after
head pruning, truncation or an edit. Module names are the same from transformers 4.25 to 5.23.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clinfast.engine.spec import Activation, EncoderSpec, Match, ParameterRef, Unsupported
from clinfast.models import checks, heads

HOME = "transformers.models.bert.modeling_bert"
SELF_ATTENTION = ("BertSelfAttention", "BertSdpaSelfAttention")

# What stands at `intermediate_act_fn` -> what it computes. transformers spells the tanh form in several ways
# that differ by rounding only.
ACTIVATIONS: dict[str, Activation] = {
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.GELUActivation": "gelu",
    "torch.nn.modules.activation.ReLU": "relu",
}
FUNCTIONS: dict[Any, Activation] = {
    nn.functional.gelu: "gelu",
    nn.functional.relu: "relu",
    torch.relu: "relu",
}


def activation(module: Any, path: str) -> Activation:
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    if callable(module) and not isinstance(module, nn.Module) and module.__hash__ and module in FUNCTIONS:
        return FUNCTIONS[module]
    raise Unsupported(f"{path} is {name}; hidden_act 'gelu', 'gelu_new', 'gelu_pytorch_tanh' or 'relu' is served")


class _Reader:
    """Walks a `BertModel` once; collects the weights and the constants, and refuses what it does not know."""

    def __init__(self, bert: nn.Module, prefix: str) -> None:
        self.prefix = prefix
        self.parameters: dict[str, ParameterRef] = {}
        self.constants: list[tuple[nn.Module, str]] = []
        self.spec = self._model(bert)

    def at(self, path: str) -> str:
        return f"{self.prefix}{path}"

    def add(self, canonical: str, module: nn.Module, *, bias: bool = True) -> None:
        for name in ("weight", "bias") if bias else ("weight",):
            self.parameters[f"{canonical}.{name}"] = ParameterRef(module, name)

    def _model(self, bert: Any) -> EncoderSpec:
        for name in ("is_decoder", "add_cross_attention"):
            checks.field(bert.config, self.at("config"), name, (False,))
        checks.named(bert.embeddings, self.at("embeddings"), HOME, "BertEmbeddings")
        checks.named(bert.encoder, self.at("encoder"), HOME, "BertEncoder")
        checks.exact(bert.encoder.layer, self.at("encoder.layer"), nn.ModuleList)
        if not len(bert.encoder.layer):
            raise Unsupported(f"{self.at('encoder.layer')} is empty; at least one layer is needed")
        tables, eps = self._embeddings(bert.embeddings)
        hidden_size = tables[0].shape[1]
        layers = [self._layer(layer, i, hidden_size, eps) for i, layer in enumerate(bert.encoder.layer)]
        for i, layer in enumerate(layers):
            for field, value in layer.items():
                if value != layers[0][field]:
                    path = self.at(f"encoder.layer.{i}")
                    raise Unsupported(f"{path} has {field} {value} but layer 0 has {layers[0][field]}")
        return EncoderSpec(
            family="bert",
            num_layers=len(layers),
            hidden_size=hidden_size,
            eps=eps,
            vocab_size=tables[0].shape[0],
            max_positions=tables[1].shape[0],
            type_vocab_size=tables[2].shape[0],
            **layers[0],
        )

    def _embeddings(self, embeddings: Any) -> tuple[list[Tensor], float]:
        path = self.at("embeddings")
        checks.field(embeddings, path, "position_embedding_type", ("absolute",))
        checks.exact(embeddings.dropout, f"{path}.dropout", nn.Dropout)
        word = checks.exact(embeddings.word_embeddings, f"{path}.word_embeddings", nn.Embedding)
        tables = []
        for canonical, name in (("word", "word"), ("position", "position"), ("token_type", "token_type")):
            attribute = f"{name}_embeddings"
            table = checks.embedding(getattr(embeddings, attribute), f"{path}.{attribute}", word.weight.shape[1])
            self.add(f"embedding.{canonical}", table, bias=False)
            tables.append(table.weight)
        norm = checks.layer_norm(embeddings.LayerNorm, f"{path}.LayerNorm", tables[0].shape[1])
        self._norm("embedding.norm", norm)
        self._default_ids(embeddings, path, tables[1].shape[0])
        return tables, norm.eps

    def _default_ids(self, embeddings: Any, path: str, max_positions: int) -> None:
        """The buffers used for absent `position_ids` and `token_type_ids` hold what they are made with."""
        for name, expected in (
            ("position_ids", torch.arange(max_positions)),
            ("token_type_ids", torch.zeros(max_positions, dtype=torch.long)),
        ):
            buffer = getattr(embeddings, name, None)
            if buffer is not None and not torch.equal(buffer.detach().cpu().flatten(), expected):
                raise Unsupported(f"the buffer {path}.{name} does not hold its default values")

    def _norm(self, canonical: str, norm: nn.LayerNorm) -> None:
        self.add(canonical, norm)
        self.constants.append((norm, "eps"))

    def _layer(self, layer: Any, i: int, hidden: int, eps: float) -> dict[str, Any]:
        path, to = self.at(f"encoder.layer.{i}"), f"layers.{i}"
        checks.named(layer, path, HOME, "BertLayer")
        checks.named(layer.attention, f"{path}.attention", HOME, "BertAttention")
        checks.named(layer.attention.output, f"{path}.attention.output", HOME, "BertSelfOutput")
        checks.named(layer.intermediate, f"{path}.intermediate", HOME, "BertIntermediate")
        checks.named(layer.output, f"{path}.output", HOME, "BertOutput")
        for name in ("is_decoder", "add_cross_attention"):
            checks.field(layer, path, name, (False,))
        attention = self._self_attention(layer.attention.self, f"{path}.attention.self", to, hidden)

        intermediate = layer.intermediate.dense
        checks.exact(intermediate, f"{path}.intermediate.dense", nn.Linear)
        inner = intermediate.out_features
        for canonical, module, name, sizes in (
            ("attention_output", layer.attention.output.dense, "attention.output.dense", (hidden, hidden)),
            ("ffn_in", intermediate, "intermediate.dense", (hidden, inner)),
            ("ffn_out", layer.output.dense, "output.dense", (inner, hidden)),
        ):
            self.add(f"{to}.{canonical}", checks.linear(module, f"{path}.{name}", *sizes))
        for canonical, owner, name in (
            ("attention_norm", layer.attention.output, "attention.output"),
            ("output_norm", layer.output, "output"),
        ):
            self._norm(
                f"{to}.{canonical}",
                checks.layer_norm(owner.LayerNorm, f"{path}.{name}.LayerNorm", hidden, eps),
            )
            checks.exact(owner.dropout, f"{path}.{name}.dropout", nn.Dropout)
        act = activation(layer.intermediate.intermediate_act_fn, f"{path}.intermediate.intermediate_act_fn")
        self._constant(layer.intermediate, "intermediate_act_fn")
        return {"intermediate_size": inner, "activation": act, **attention}

    def _self_attention(self, attention: Any, path: str, to: str, hidden: int) -> dict[str, Any]:
        checks.named(attention, path, HOME, *SELF_ATTENTION)
        checks.field(attention, path, "position_embedding_type", ("absolute",))
        for name in ("is_decoder", "is_causal"):
            checks.field(attention, path, name, (False,))
        num_heads, head_dim = attention.num_attention_heads, attention.attention_head_size
        if num_heads * head_dim != hidden:
            raise Unsupported(
                f"{path} has {num_heads} heads of {head_dim}, which does not make hidden_size {hidden}; "
                "pruned heads are not served"
            )
        for name in ("num_attention_heads", "attention_head_size", "scaling", "is_causal"):
            self._constant(attention, name)
        for name in ("query", "key", "value"):
            self.add(f"{to}.{name}", checks.linear(getattr(attention, name), f"{path}.{name}", hidden, hidden))
        checks.exact(attention.dropout, f"{path}.dropout", nn.Dropout)
        return {
            "num_heads": num_heads,
            "head_dim": head_dim,
            "scale": getattr(attention, "scaling", head_dim**-0.5),
        }

    def _constant(self, module: nn.Module, name: str) -> None:
        if name in module.__dict__:
            self.constants.append((module, name))


def _pooler(reader: _Reader, pooler: Any) -> None:
    path, hidden = reader.at("pooler"), reader.spec.hidden_size
    checks.named(pooler, path, HOME, "BertPooler")
    checks.exact(pooler.activation, f"{path}.activation", nn.Tanh)
    reader.add("pooler", checks.linear(pooler.dense, f"{path}.dense", hidden, hidden))


def base(model: Any) -> Match:
    reader = _Reader(model, "")
    pooler = getattr(model, "pooler", None)
    if pooler is not None:
        _pooler(reader, pooler)
    head, build = heads.base_model(pooler=pooler is not None)
    return Match(reader.spec, head, reader.parameters, build, tuple(reader.constants))


def with_head(model: Any, make_head: Callable[[], tuple[Any, heads.BuildOutput]]) -> Match:
    checks.named(model.bert, "bert", HOME, "BertModel")
    reader = _Reader(model.bert, "bert.")
    head, build = make_head()
    if head.pooler:
        _pooler(reader, model.bert.pooler)
    checks.exact(model.dropout, "dropout", nn.Dropout)
    checks.exact(model.classifier, "classifier", nn.Linear)
    classifier = checks.linear(model.classifier, "classifier", reader.spec.hidden_size, model.classifier.out_features)
    reader.add("classifier", classifier)
    return Match(reader.spec, head, reader.parameters, build, tuple(reader.constants))


CLASSES: dict[str, Callable[[Any], Match]] = {
    "BertModel": base,
    "BertForSequenceClassification": functools.partial(with_head, make_head=heads.sequence_classifier),
    "BertForTokenClassification": functools.partial(with_head, make_head=heads.token_classifier),
}
