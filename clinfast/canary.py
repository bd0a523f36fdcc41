"""A tiny batch through both paths before a module is handed over: drift in transformers shows here, not to a user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clinfast.engine.encoder import Encoder
from clinfast.engine.spec import Match, Request, Unsupported
from clinfast.patch import stock_forward

LENGTHS = (8, 5)

# Largest difference from stock, as a share of the largest stock value, by the coarser of the two dtypes: the one
# computed in, and the model's own, in which stock computes. Rounding stays ten times below; a changed formula is ten
# times above.
BUDGET = {
    torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1,
    torch.float8_e4m3fn: 5e-1,
}  # fmt: skip


def canary_request(encoder: Encoder) -> Request:
    spec, device = encoder.spec, encoder.refs[0].tensor().device
    seqlen = max(1, min(LENGTHS[0], spec.max_seqlen))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, spec.vocab_size, (len(LENGTHS), seqlen), generator=generator).to(device)
    mask = torch.ones(len(LENGTHS), seqlen, dtype=torch.long, device=device)
    mask[1, LENGTHS[1] :] = 0
    types = (ids % spec.type_vocab_size) if spec.type_vocab_size else None
    return Request(ids, mask, types, num_choices=len(LENGTHS) if encoder.head.choices else None)


def check(module: nn.Module, match: Match, encoder: Encoder) -> float:
    """The largest absolute difference between both paths.

    Raises:
        Unsupported: the difference is beyond the budget of the dtype; the message has both figures.
    """
    request = canary_request(encoder)
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: value for name, value in zip(names, request[:3], strict=True) if value is not None}
    if request.num_choices is not None:
        inputs = {name: value[None] for name, value in inputs.items()}
    with torch.no_grad(), evaluating(module):
        ours = match.build_output(encoder.run(request), request)
        stock = stock_forward(module, **inputs)
    if type(ours) is not type(stock):
        raise Unsupported(
            f"stock returns a {type(stock).__name__}, the fast path a {type(ours).__name__}; this version of "
            "transformers is not known"
        )
    worst = 0.0
    for name, expected in tensors_of(stock).items():
        got = tensors_of(ours).get(name)
        if got is None or got.shape != expected.shape or got.dtype is not expected.dtype:
            raise Unsupported(f"stock returns {name} {describe(expected)}, the fast path {describe(got)}")
        difference, scale = compare(got, expected, request.attention_mask if name in match.per_token else None)
        budget = max(BUDGET[encoder.coarsest], BUDGET[encoder.model_dtype]) * max(scale, 1e-3)
        if not difference <= budget:
            raise Unsupported(
                f"the canary batch differs from stock by {difference:.2e} in {name}, beyond the budget of "
                f"{budget:.2e}; this version of transformers may compute the model in another way"
            )
        worst = max(worst, difference)
    return worst


def compare(ours: Tensor, stock: Tensor, mask: Tensor | None) -> tuple[float, float]:
    """Largest absolute difference, and the largest stock value; of a per-token output, at real positions of `mask`."""
    ours, stock = ours.double(), stock.double()
    if mask is not None:
        ours, stock = ours[mask.bool()], stock[mask.bool()]
    if not stock.numel():
        return 0.0, 0.0
    return (ours - stock).abs().max().item(), stock.abs().max().item()


def tensors_of(output: Any) -> dict[str, Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def describe(x: Tensor | None) -> str:
    return "nothing" if x is None else f"{list(x.shape)} {x.dtype}"


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the module and its children, each put back to its own flag afterwards."""
    flags = [(child, child.training) for child in module.modules() if child.training]
    for child, _ in flags:
        child.training = False
    try:
        yield
    finally:
        for child, flag in flags:
            child.training = flag
