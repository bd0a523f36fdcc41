"""The models and batches of the GPU benchmarks, and the peers that run them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from clinfast import patch
from clinfast.engine.spec import EncoderSpec

SIZES = {
    "minilm": {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 6},
    "bert-base": {},
    "bert-large": {
        "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24
    },
}  # fmt: skip
MODELS = (*SIZES, "distilbert-qa")


def model(name: str) -> nn.Module:
    """Random weights of the real sizes: time does not depend on them. In bf16, on the GPU."""
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertForQuestionAnswering

    torch.manual_seed(0)
    if name == "distilbert-qa":
        made = DistilBertForQuestionAnswering(DistilBertConfig())
    else:
        made = BertModel(BertConfig(**SIZES[name]))
    return made.to("cuda", torch.bfloat16).eval()


def _clinical(rng: np.random.Generator) -> list[int]:
    """32 notes, log-normal, median 120, cut at 512: 36% of the padded area is real."""
    return np.clip(rng.lognormal(np.log(120), 0.9, 32), 8, 512).astype(int).tolist()


def _squad(rng: np.random.Generator) -> list[int]:
    """64 questions with their passages: mean 177, none beyond 384, as in MLPerf's task."""
    lengths = np.clip(rng.normal(175, 50, 64), 60, 384)
    return np.clip(lengths * 177 / lengths.mean(), 60, 384).astype(int).tolist()


def cells() -> dict[str, list[int]]:
    """Lengths of the notes of each batch."""
    rng = np.random.default_rng(0)
    found = {f"1x{length}": [length] for length in (16, 128, 384, 512)}
    found |= {"32x128": [128] * 32, "8x512": [512] * 8}
    return found | {"ragged-32": _clinical(rng), "squad-64": _squad(rng)}


def inputs(lengths: list[int], device: str = "cuda") -> dict[str, Tensor]:
    columns = max(lengths)
    ids = torch.randint(5, 20000, (len(lengths), columns), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(columns) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def compiled(stock: nn.Module) -> nn.Module:
    """max-autotune, which replays CUDA graphs. Compiled anew for each shape."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.config.cache_size_limit = 64
    return torch.compile(copy.deepcopy(stock), mode="max-autotune", dynamic=False)  # type: ignore[return-value]


def varlen(stock: nn.Module) -> Callable[..., Tensor]:
    """Packed tokens by plain PyTorch: `F.linear`, `varlen_attn`, add and LayerNorm. Gives padded hidden states.

    Raises:
        ImportError: this torch has no `torch.nn.attention.varlen`.
    """
    from torch.nn.attention.varlen import varlen_attn

    (unit,) = patch.find_units(stock)
    match = unit.match
    assert match is not None
    spec: EncoderSpec = match.encoder
    w = {name: ref.tensor().detach() for name, ref in match.parameters.items()}
    qkv = [
        tuple(
            torch.cat([w[f"layers.{i}.{stem}.{kind}"] for stem in ("query", "key", "value")])
            for kind in ("weight", "bias")
        )
        for i in range(spec.num_layers)
    ]

    def linear(x: Tensor, stem: str) -> Tensor:
        return functional.linear(x, w[f"{stem}.weight"], w[f"{stem}.bias"])

    def norm(x: Tensor, stem: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], w[f"{stem}.weight"], w[f"{stem}.bias"], spec.eps)

    def call(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        at = attention_mask.flatten().nonzero().view(-1)
        lengths = attention_mask.sum(1, dtype=torch.int32)
        cu_seqlens = functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        longest = int(lengths.max())
        x = w["embedding.word.weight"][input_ids.flatten()[at]]
        x = x + w["embedding.position.weight"][at % input_ids.shape[1]]
        if spec.type_vocab_size:
            x = x + w["embedding.token_type.weight"][0]
        x = norm(x, "embedding.norm")
        for i in range(spec.num_layers):
            q, k, v = functional.linear(x, *qkv[i]).view(len(x), 3, spec.num_heads, spec.head_dim).unbind(1)
            y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest).flatten(1)
            x = norm(linear(y, f"layers.{i}.attention_output") + x, f"layers.{i}.attention_norm")
            y = linear(functional.gelu(linear(x, f"layers.{i}.ffn_in")), f"layers.{i}.ffn_out")
            x = norm(y + x, f"layers.{i}.output_norm")
        out = x.new_zeros(attention_mask.numel(), x.shape[1])
        out[at] = x
        return out.view(*attention_mask.shape, -1)

    return call


def flops(name: str, lengths: list[int]) -> float:
    """Multiplications and additions that the batch's real tokens need; two a multiply-add."""
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12} | SIZES.get(name, {})
    if name == "distilbert-qa":
        size["num_hidden_layers"] = 6
    hidden, inner, layers = size["hidden_size"], size["intermediate_size"], size["num_hidden_layers"]
    tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
    return layers * (2.0 * tokens * (4 * hidden * hidden + 2 * hidden * inner) + 4.0 * pairs * hidden)


def first_tensor(output: Any) -> Tensor:
    """Hidden states, or the start logits."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = next(iter(output.values()))
    return found
