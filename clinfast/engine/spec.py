"""What an encoder computes, as plain data; where its weights live is kept apart, in `ParameterRef`s."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
HeadActivation = Literal["none", "gelu", "gelu_tanh", "relu", "tanh", "silu"]

# Rows of a branch that are the first ones of packed notes.
FIRST_ROWS = ("first_token", "first_real_token")
LAYER_NORMS = ("attention_norm", "output_norm")
# Columns where nothing bounds them: positions are int32, and a batch has several notes.
ANY_LENGTH = 1 << 24


@dataclasses.dataclass(frozen=True)
class Disentangled:
    """DeBERTa's attention by relative positions: see `ops.attention_disentangled`.

    Its tables are made when weights are packed, from `relative.table.weight` [2 span, hidden_size] through a projection
    of each layer: `position_key` and `position_query` of its own, or `key` and `query` where they are shared.

    Args:
        terms: `"c2p"` is a query by a position's key, `"p2c"` a key by a position's query.
        position_buckets, max_relative_positions: as in `ops.attention_disentangled.log_buckets`.
        shared: the layers project with their own `key` and `query`.
        key_bias: whether `position_key` has a bias.
        norm: the table passes a LayerNorm first, `relative.norm`.
    """

    terms: tuple[str, ...]
    span: int
    position_buckets: int
    max_relative_positions: int
    shared: bool = False
    key_bias: bool = True
    norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))

    def parameter_names(self, layers: int) -> list[str]:
        names = ["relative.table.weight"]
        if self.norm:
            names += ["relative.norm.weight", "relative.norm.bias"]
        for i in () if self.shared else range(layers):
            if "c2p" in self.terms:
                names += [f"layers.{i}.position_key.{kind}" for kind in ("weight", "bias")[: 1 + self.key_bias]]
            if "p2c" in self.terms:
                names += [f"layers.{i}.position_query.{kind}" for kind in ("weight", "bias")]
        return names


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """One encoder's arithmetic. Hashable, and equal specs compute the same function of the same weights.

    Args:
        family: the adapter that made it, e.g. `"bert"`.
        activation: FFN activation; `"gelu"` is the exact erf form.
        eps: LayerNorm epsilon, used by every LayerNorm of the encoder.
        scale: factor on the attention scores, normally `head_dim ** -0.5`.
        type_vocab_size: 0 where the family has no token types.
        position_offset: the smallest position of a real token.
        position_padding_idx: None where a token's position is its column + `position_offset`; else positions are
            counted as RoBERTa does (`ops.packing.position_ids`) over ids that are not this one.
        embedding_size: width of the embedding tables; 0 is `hidden_size`.
        projects_embedding: whether a linear follows the embedding; None is where the two widths differ.
        embedding_norm: whether the embedding ends in a LayerNorm.
        pre_norm: each layer's LayerNorms stand before attention and FFN, inside the residuals, and one more, named
            `final_norm`, after the last layer; else they stand behind the residuals.
        layer_weights: for each layer the number of the weights that it uses, from 0 on, where layers share them; () is
            a set for each layer.
        task_type_vocab_size: rows of a table whose first is added to every token's embedding; 0 where there is none.
        disentangled: what attention adds to its scores; None is plain attention.
        position_table: whether positions have embeddings. Where they have none, `max_positions` bounds them anyway, 0
            being no bound.
        windows: for each layer the distance up to which a token sees others, -1 for all; () where every layer sees all.
        rotations: for each layer the number of the rotary embedding that turns its queries and keys, from 0 on; () for
            none. Its inverse frequencies are `rotation.<number>.inverse_frequencies`.
        gated: FFN is activation(first half) * second half of twice `intermediate_size`; with `"apart"` the halves are
            weights of their own, `ffn_in` and `ffn_gate`.
        packed_qkv: query, key and value are one weight, `qkv`.
        without_bias: stems of the linears and LayerNorms that have none, `embedding.norm` and `final_norm` among them.
        first_norm: whether the first layer has an `attention_norm`.
        relative_buckets: buckets of relative distances (`engine.relative_bias`), each with a bias for every head, which
            all layers add to their scores; 0 where there are none.
        relative_max_distance: from here on distances share the last bucket.
        relative_rows: rows of the table of biases; those past the buckets are not used.
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
    position_padding_idx: int | None = None
    embedding_size: int = 0
    projects_embedding: bool | None = None
    embedding_norm: bool = True
    pre_norm: bool = False
    layer_weights: tuple[int, ...] = ()
    task_type_vocab_size: int = 0
    disentangled: Disentangled | None = None
    position_table: bool = True
    windows: tuple[int, ...] = ()
    rotations: tuple[int, ...] = ()
    gated: Literal["", "packed", "apart"] = ""
    packed_qkv: bool = False
    without_bias: tuple[str, ...] = ()
    first_norm: bool = True
    relative_buckets: int = 0
    relative_max_distance: int = 128
    relative_rows: int = 0

    def __post_init__(self) -> None:
        for name in ("windows", "rotations", "without_bias"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("windows", "rotations"):
            if len(getattr(self, name)) not in (0, self.num_layers):
                raise ValueError(f"{name} is {getattr(self, name)}; {self.num_layers} numbers are needed, or none")
        if self.rotations and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings turn pairs, so an even one is needed")
        object.__setattr__(self, "embedding_size", self.embedding_size or self.hidden_size)
        if self.projects_embedding is None:
            object.__setattr__(self, "projects_embedding", self.embedding_size != self.hidden_size)
        elif not self.projects_embedding and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"embedding_size is {self.embedding_size} and hidden_size {self.hidden_size}; a linear must stand "
                "between them"
            )
        object.__setattr__(self, "layer_weights", tuple(self.layer_weights) or tuple(range(self.num_layers)))
        if len(self.layer_weights) != self.num_layers or set(self.layer_weights) != set(range(self.num_weights)):
            raise ValueError(
                f"layer_weights is {self.layer_weights}; {self.num_layers} numbers are needed, and none left out"
            )
        if self.num_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                f"num_heads x head_dim is {self.num_heads} x {self.head_dim}, which must equal "
                f"hidden_size {self.hidden_size}"
            )
        if not 1 <= self.head_dim <= 256:
            raise ValueError(f"head_dim is {self.head_dim}; the attention kernels serve 1 to 256")
        if self.relative_rows < self.relative_buckets:
            raise ValueError(
                f"relative_rows is {self.relative_rows}; {self.relative_buckets} are needed, one for each bucket"
            )

    @property
    def max_seqlen(self) -> int:
        """Columns that are served."""
        if not (self.position_table or self.max_positions):
            return ANY_LENGTH
        return self.max_positions - self.position_offset

    @property
    def num_weights(self) -> int:
        """Sets of layer weights; fewer than layers where layers share."""
        return max(self.layer_weights, default=-1) + 1

    @property
    def uses_places(self) -> bool:
        """Whether distances between a note's tokens count, beyond what the embedding adds."""
        return bool(self.rotations) or self.has_windows

    @property
    def has_windows(self) -> bool:
        return any(window >= 0 for window in self.windows)

    def window_of(self, layer: int) -> int:
        """-1 where the layer sees all keys."""
        return self.windows[layer] if self.windows else -1

    @property
    def layer_linears(self) -> tuple[str, ...]:
        queries = ("qkv",) if self.packed_qkv else ("query", "key", "value")
        gate = ("ffn_gate",) if self.gated == "apart" else ()
        return (*queries, "attention_output", "ffn_in", *gate, "ffn_out")

    def parameter_names(self) -> tuple[str, ...]:
        """Canonical names of the encoder's weights, in the order in which they are passed around."""
        names = ["embedding.word.weight"]
        if self.position_table:
            names.append("embedding.position.weight")
        if self.type_vocab_size:
            names.append("embedding.token_type.weight")
        if self.task_type_vocab_size:
            names.append("embedding.task_type.weight")
        if self.embedding_norm:
            names += ["embedding.norm.weight", "embedding.norm.bias"]
        if self.projects_embedding:
            names += ["embedding.projection.weight", "embedding.projection.bias"]
        if self.relative_buckets:
            names.append("relative_bias.weight")
        for i in range(self.num_weights):
            for stem in self.layer_linears + LAYER_NORMS:
                if self.first_norm or (i, stem) != (0, "attention_norm"):
                    names += [f"layers.{i}.{stem}.weight", f"layers.{i}.{stem}.bias"]
        if self.pre_norm:
            names += ["final_norm.weight", "final_norm.bias"]
        if self.disentangled is not None:
            names += self.disentangled.parameter_names(self.num_weights)
        names = [name for name in names if not self._is_left_out(name)]
        return (*names, *(f"rotation.{i}.inverse_frequencies" for i in range(max(self.rotations, default=-1) + 1)))

    def _is_left_out(self, name: str) -> bool:
        stem, _, kind = name.rpartition(".")
        stem = stem.rpartition(".")[2] if stem.startswith("layers.") else stem
        return kind == "bias" and stem in self.without_bias

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by canonical name."""
        hidden, inner, width = self.hidden_size, self.intermediate_size, self.embedding_size
        square = ("query", "key", "value", "attention_output", "position_key", "position_query")
        linears = dict.fromkeys(square, (hidden, hidden))
        linears |= {"ffn_in": (inner, hidden), "ffn_out": (hidden, inner), "projection": (hidden, width)}
        linears |= {"qkv": (3 * hidden, hidden), "ffn_gate": (inner, hidden)}
        if self.gated == "packed":
            linears["ffn_in"] = (2 * inner, hidden)
        tables = {"word": self.vocab_size, "position": self.max_positions, "token_type": self.type_vocab_size}
        tables["task_type"] = self.task_type_vocab_size
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.parameter_names():
            *_, stem, kind = name.split(".")
            if kind == "inverse_frequencies":
                shapes[name] = (self.head_dim // 2,)
            elif name == "relative.table.weight":
                assert self.disentangled is not None
                shapes[name] = (2 * self.disentangled.span, hidden)
            elif stem == "relative_bias":
                shapes[name] = (self.relative_rows, self.num_heads)
            elif stem in tables:
                shapes[name] = (tables[stem], width)
            elif stem in linears:
                shapes[name] = linears[stem] if kind == "weight" else linears[stem][:1]
            else:
                shapes[name] = (width,) if name.startswith("embedding.") else (hidden,)
        return shapes

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> EncoderSpec:
        facts = json.loads(text)
        if facts["disentangled"] is not None:
            facts["disentangled"] = Disentangled(**facts["disentangled"])
        return cls(**facts)


@dataclasses.dataclass(frozen=True)
class Dense:
    """One dense layer of a head: activation(x @ weight.T + bias), then LayerNorm where `eps` is given.

    Its weights are `<name>.weight` and `<name>.bias`, and `<name>.norm.weight` and `<name>.norm.bias`; the biases are
    there where `bias` and `norm_bias` say so.
    """

    name: str
    in_features: int
    out_features: int
    activation: HeadActivation = "none"
    eps: float | None = None
    bias: bool = True
    norm_bias: bool = True

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            f"{self.name}.weight": (self.out_features, self.in_features),
            f"{self.name}.bias": (self.out_features,),
            f"{self.name}.norm.weight": (self.out_features,),
            f"{self.name}.norm.bias": (self.out_features,),
        }
        has_norm = self.eps is not None
        there = (True, self.bias, has_norm, has_norm and self.norm_bias)
        return {name: shape for (name, shape), is_there in zip(shapes.items(), there, strict=True) if is_there}


@dataclasses.dataclass(frozen=True)
class Branch:
    """Dense layers one after the other, on every token or on one row a note.

    Args:
        rows: a note's row is column 0 (`"first_token"`), its first real token wherever that stands
            (`"first_real_token"`), or the mean of its real tokens (`"mean"`).
        pads: what stands at padded positions of a per-token result: 0, or the dtype's minimum, which no argmax picks.
        selectable: whether a request may ask for some positions only.
    """

    rows: Literal["first_token", "first_real_token", "mean", "per_token"]
    layers: tuple[Dense, ...]
    pads: Literal["zero", "min"] = "zero"
    selectable: bool = False

    @property
    def out_features(self) -> int:
        return self.layers[-1].out_features


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """What follows the encoder, on packed rows.

    Args:
        name: for the report, e.g. `"token_classification"`.
        hidden_states: whether the encoder's own output is asked for.
        branches: each makes one output.
        choices: whether inputs are [B, C, S], C texts a question.
    """

    name: str
    hidden_states: bool = False
    branches: tuple[Branch, ...] = ()
    choices: bool = False

    @property
    def reads_first_token(self) -> bool:
        """Whether column 0 has to be real."""
        return any(branch.rows == "first_token" for branch in self.branches)

    @property
    def only_first_tokens(self) -> bool:
        """Then the last layer works on one row a note."""
        return not self.hidden_states and all(branch.rows in FIRST_ROWS for branch in self.branches)

    @property
    def selectable(self) -> bool:
        return any(branch.selectable for branch in self.branches)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for branch in self.branches:
            for dense in branch.layers:
                shapes |= dense.parameter_shapes()
        return shapes

    def parameter_names(self) -> tuple[str, ...]:
        return tuple(self.parameter_shapes())

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> HeadSpec:
        branches = tuple(
            Branch(**{**branch, "layers": tuple(Dense(**dense) for dense in branch["layers"])})
            for branch in facts["branches"]
        )
        return cls(**{**facts, "branches": branches})


class ParameterRef(NamedTuple):
    """Where a live weight is found: `module._parameters[name]`, or a buffer; read anew at every staleness check."""

    module: nn.Module
    name: str

    @property
    def holder(self) -> dict[str, Any]:
        """The dict that has it."""
        module = self.module
        return module._parameters if self.name in module._parameters else module._buffers

    def tensor(self) -> Tensor:
        tensor: Tensor = self.holder[self.name]
        return tensor


class Match(NamedTuple):
    """What an adapter says of a live module that it recognised.

    `parameters` has exactly the names of `encoder.parameter_names() + head.parameter_names()`. `build_output` turns an
    `EncoderOutput` and its `Request` into the stock output class; `per_token` names the fields of it that are
    [B, S, ...]. `constants` are attributes of live submodules and configs that are part of the arithmetic, such
    as `LayerNorm.eps`: the guard reads them again at every call. `zero_or_one`: a mask with other values than these two
    means something of its own to stock.
    """

    encoder: EncoderSpec
    head: HeadSpec
    parameters: dict[str, ParameterRef]
    build_output: Any
    per_token: tuple[str, ...] = ()
    constants: tuple[tuple[Any, str], ...] = ()
    zero_or_one: bool = False


class Request(NamedTuple):
    """A call that the guard admitted: padded inputs as the user gave them.

    `input_ids` [B, S] int32/int64; `attention_mask` [B, S] bool or int, None where all positions are real;
    `token_type_ids` [B, S] int32/int64, None for zeros; `positions` [B, S] bool, where a selectable branch is wanted,
    None for everywhere; `num_choices` C where the inputs came as [B / C, C, S].
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    positions: Tensor | None = None
    num_choices: int | None = None


class EncoderOutput(NamedTuple):
    """Padded results in the model's own dtype.

    `hidden_states` [B, S, H], None where the head does not ask for them; `branches`, one for each of the head's: [B, N]
    for first tokens, [B, S, N] for every token, [P, N] for P chosen positions in the order of the batch.
    """

    hidden_states: Tensor | None
    branches: tuple[Tensor, ...] = ()


class Unsupported(Exception):
    """An adapter or a backend cannot serve this model; the message names the field, its value, and what would."""


class NotServed(Exception):
    """This call cannot take the fast path for a reason seen only in its values; the stock forward runs."""
