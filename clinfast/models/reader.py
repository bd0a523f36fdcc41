"""Collects what an adapter reads off a live model: weights by canonical name, constants, layers that must agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clinfast.engine.spec import Activation, Dense, EncoderSpec, HeadActivation, Match, ParameterRef, Unsupported
from clinfast.models import checks
from clinfast.models.activations import activation
from clinfast.models.heads import Head


class Family(NamedTuple):
    """One Hugging Face architecture among those that share an adapter.

    Args:
        name: as in `EncoderSpec.family`.
        home: the Python module of its classes.
        prefix: what its class names start with.
        base: where a model with a head holds the base model.
        read: `read(base_model, path_prefix, family)` reads the encoder.
    """

    name: str
    home: str
    prefix: str
    base: str
    read: Callable[[Any, str, Family], Reader]

    def check(self, module: Any, path: str, *names: str) -> Any:
        """`module`, whose class must be one of `names` after the prefix."""
        return checks.named(module, path, self.home, *(self.prefix + name for name in names))

    def base_of(self, model: Any) -> Reader:
        """The encoder under a head."""
        base = self.check(getattr(model, self.base), self.base, "Model")
        return self.read(base, f"{self.base}.", self)


class Reader:
    """One encoder while it is read; `spec` is what came out.

    Attributes:
        bare: whether linears and LayerNorms may have no bias.
    """

    spec: EncoderSpec
    bare = False

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.parameters: dict[str, ParameterRef] = {}
        self.constants: list[tuple[Any, str]] = []

    def at(self, path: str) -> str:
        return f"{self.prefix}{path}"

    def pooler(self, model: Any, family: Family) -> Dense:
        """The base model's pooler, under BERT's names."""
        path, module = self.at("pooler"), model.pooler
        family.check(module, path, "Pooler")
        checks.exact(module.activation, f"{path}.activation", nn.Tanh)
        return self.dense("pooler", module.dense, f"{path}.dense", self.spec.hidden_size, activation="tanh")

    def match(self, head: Head) -> Match:
        return Match(self.spec, head.spec, self.parameters, head.build, head.per_token, tuple(self.constants))

    def constant(self, owner: Any, *names: str) -> None:
        """Attributes of a module or config that the guard compares at every call."""
        self.constants += [(owner, name) for name in names if name in owner.__dict__]

    def linear(self, canonical: str, module: Any, path: str, inputs: int, outputs: int) -> None:
        self._add(canonical, checks.linear(module, path, inputs, outputs, bare=self.bare))

    def norm(self, canonical: str, module: Any, path: str, size: int, eps: float | None = None) -> float:
        """Its epsilon."""
        norm = checks.layer_norm(module, path, size, eps, bare=self.bare)
        self._add(canonical, norm)
        self.constant(norm, "eps")
        return norm.eps

    def table(self, canonical: str, module: Any, path: str, size: int) -> Tensor:
        table = checks.embedding(module, path, size)
        self._add(canonical, table, bias=False)
        return table.weight

    def activation(self, owner: nn.Module, path: str, name: str, *, silu: bool = False) -> Activation:
        self.constant(owner, name)
        return activation(getattr(owner, name), f"{path}.{name}", silu=silu)

    def dense(
        self, name: str, module: Any, path: str, inputs: int, *, activation: HeadActivation = "none", norm: Any = None
    ) -> Dense:
        """A dense layer of the head, with a LayerNorm behind it where `norm` is one: its path and module."""
        checks.exact(module, path, nn.Linear)
        outputs = module.out_features
        self.linear(name, module, path, inputs, outputs)
        eps = None if norm is None else self.norm(f"{name}.norm", norm[1], norm[0], outputs)
        norm_bias = norm is None or checks.has_bias(norm[1])
        return Dense(name, inputs, outputs, activation, eps, checks.has_bias(module), norm_bias)

    def tied(self, name: str, table: Any, owner: Any, path: str, inputs: int) -> Dense:
        """A decoder whose weight is the embedding `table`, and whose bias is `owner`'s."""
        outputs = checks.embedding(table, path, inputs).weight.shape[0]
        checks.parameter(owner, path, "bias", (outputs,))
        self.parameters[f"{name}.weight"] = ParameterRef(table, "weight")
        self.parameters[f"{name}.bias"] = ParameterRef(owner, "bias")
        return Dense(name, inputs, outputs)

    def same_layers(self, layers: list[dict[str, Any]], path: str) -> dict[str, Any]:
        """What all layers have in common, which must be everything."""
        for i, layer in enumerate(layers):
            for field, value in layer.items():
                if value != layers[0][field]:
                    raise Unsupported(f"{path}.{i} has {field} {value} but layer 0 has {layers[0][field]}")
        return layers[0]

    def default_ids(self, embeddings: Any, path: str, max_positions: int) -> None:
        """The buffers used for absent `position_ids` and `token_type_ids` hold what they are made with."""
        for name, expected in (
            ("position_ids", torch.arange(max_positions)),
            ("token_type_ids", torch.zeros(max_positions, dtype=torch.long)),
        ):
            buffer = getattr(embeddings, name, None)
            if buffer is not None and not torch.equal(buffer.detach().cpu().flatten(), expected):
                raise Unsupported(f"the buffer {path}.{name} does not hold its default values")

    def heads(self, attention: Any, path: str, num_heads: int, head_dim: int, hidden: int) -> dict[str, Any]:
        if num_heads * head_dim != hidden:
            raise Unsupported(
                f"{path} has {num_heads} heads of {head_dim}, which does not make hidden_size {hidden}; "
                "pruned heads are not served"
            )
        scale = getattr(attention, "scaling", head_dim**-0.5)
        return {"num_heads": num_heads, "head_dim": head_dim, "scale": scale}

    def without_bias(self, *stems: str) -> tuple[str, ...]:
        """Those of `stems`, below the encoder or the layers read so far, that have no bias; layers must agree."""
        bare = []
        for stem in stems:
            found = {
                f"{name.removesuffix('weight')}bias" in self.parameters
                for name in self.parameters
                if name in (f"{stem}.weight",) or (name.startswith("layers.") and name.endswith(f".{stem}.weight"))
            }
            if len(found) > 1:
                raise Unsupported(f"{stem} has a bias in some layers and none in others; all or none is served")
            if found == {False}:
                bare.append(stem)
        return tuple(bare)

    def rotation(self, module: Any, name: str, path: str, head_dim: int) -> int:
        """The number of the rotary embedding whose inverse frequencies are the buffer `name` of `module`."""
        buffer = module._buffers.get(name)
        if buffer is None or tuple(buffer.shape) != (head_dim // 2,) or head_dim % 2:
            raise Unsupported(f"{path}.{name} is not a buffer of {head_dim / 2:g} frequencies, one for two of head_dim")
        ref = ParameterRef(module, name)
        known = [key for key, other in self.parameters.items() if other == ref]
        if not known:
            numbers = sum(key.startswith("rotation.") for key in self.parameters)
            known = [f"rotation.{numbers}.inverse_frequencies"]
            self.parameters[known[0]] = ref
        return int(known[0].split(".")[1])

    def _add(self, canonical: str, module: nn.Module, *, bias: bool = True) -> None:
        for name in ("weight", "bias") if bias and checks.has_bias(module) else ("weight",):
            self.parameters[f"{canonical}.{name}"] = ParameterRef(module, name)
