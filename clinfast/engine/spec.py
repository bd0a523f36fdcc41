"""What an encoder computes, as plain data; where its weights live is kept apart, in `ParameterRef`s."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

Activation = Literal["gelu", "gelu_tanh", "relu"]
HeadKind = Literal["none", "first_token", "per_token"]

LAYER_LINEARS = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
LAYER_NORMS = ("attention_norm", "output_norm")


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """One encoder's arithmetic. Hashable, and equal specs compute the same function of the same weights.

    Args:
        family: the adapter that made it, e.g. `"bert"`.
        activation: FFN activation; `"gelu"` is the exact erf form.
        eps: LayerNorm epsilon, used by every LayerNorm of the encoder.
        scale: factor on the attention scores, normally `head_dim ** -0.5`.
        position_offset: added to a token's column to get its position id.
        type_vocab_size: 0 where the family has no token types.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    head_dim: int
    activation: Activation
    eps: float
    scale: float
    vocab_size: int
    max_positions: int
    type_vocab_size: int
    position_offset: int = 0

    def __post_init__(self) -> None:
        if self.num_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                f"num_heads x head_dim is {self.num_heads} x {self.head_dim}, which must equal "
                f"hidden_size {self.hidden_size}"
            )
        if not 1 <= self.head_dim <= 256:
            raise ValueError(f"head_dim is {self.head_dim}; the attention kernels serve 1 to 256")

    def parameter_names(self) -> tuple[str, ...]:
        """Canonical names of the encoder's weights, in the order in which they are passed around."""
        names = ["embedding.word.weight", "embedding.position.weight"]
        if self.type_vocab_size:
            names.append("embedding.token_type.weight")
        names += ["embedding.norm.weight", "embedding.norm.bias"]
        for i in range(self.num_layers):
            for stem in LAYER_LINEARS + LAYER_NORMS:
                names += [f"layers.{i}.{stem}.weight", f"layers.{i}.{stem}.bias"]
        return tuple(names)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by canonical name."""
        hidden, inner = self.hidden_size, self.intermediate_size
        linears = dict.fromkeys(LAYER_LINEARS, (hidden, hidden))
        linears |= {"ffn_in": (inner, hidden), "ffn_out": (hidden, inner)}
        tables = {"word": self.vocab_size, "position": self.max_positions, "token_type": self.type_vocab_size}
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.parameter_names():
            *_, stem, kind = name.split(".")
            if stem in tables:
                shapes[name] = (tables[stem], hidden)
            elif stem in linears:
                shapes[name] = linears[stem] if kind == "weight" else linears[stem][:1]
            else:
                shapes[name] = (hidden,)
        return shapes

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> EncoderSpec:
        return cls(**json.loads(text))


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """What follows the encoder, on packed rows.

    Args:
        kind: `"none"` hands back hidden states; `"first_token"` needs one row a note; `"per_token"` all rows.
        pooler: whether a dense + tanh on the first token comes before the classifier (or is itself an output).
        classifier: whether a final linear makes logits.
    """

    kind: HeadKind
    pooler: bool = False
    classifier: bool = False

    def parameter_names(self) -> tuple[str, ...]:
        names: list[str] = []
        if self.pooler:
            names += ["pooler.weight", "pooler.bias"]
        if self.classifier:
            names += ["classifier.weight", "classifier.bias"]
        return tuple(names)


class ParameterRef(NamedTuple):
    """Where a live weight is found: `module._parameters[name]`, read anew at every staleness check."""

    module: nn.Module
    name: str

    def tensor(self) -> Tensor:
        return self.module._parameters[self.name]  # type: ignore[return-value]


class Match(NamedTuple):
    """What an adapter says of a live module that it recognised.

    `parameters` has exactly the names of `encoder.parameter_names() + head.parameter_names()`. `heads` is the
    adapter's function that turns an `EncoderOutput` into the stock output class. `constants` are attributes of live
    submodules that are part of the arithmetic, such as `LayerNorm.eps`: the guard reads them again at every call.
    """

    encoder: EncoderSpec
    head: HeadSpec
    parameters: dict[str, ParameterRef]
    build_output: Any
    constants: tuple[tuple[nn.Module, str], ...] = ()


class Request(NamedTuple):
    """A call that the guard admitted: padded inputs as the user gave them.

    `input_ids` [B, S] int32/int64; `attention_mask` [B, S] bool or int, None where all positions are real;
    `token_type_ids` [B, S] int32/int64, None for zeros.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    token_type_ids: Tensor | None


class EncoderOutput(NamedTuple):
    """Padded results in the model's own dtype: `hidden_states` [B, S, H], `pooled` [B, H], `logits` [B, C] or
    [B, S, C]; None where the head does not make it."""

    hidden_states: Tensor | None
    pooled: Tensor | None
    logits: Tensor | None


class Unsupported(Exception):
    """An adapter or a backend cannot serve this model; the message names the field, its value, and what would."""


class NotServed(Exception):
    """This call cannot take the fast path for a reason seen only in its values; the stock forward runs."""
