"""What `clinfast tune` times to choose between the backends: each op as a BERT-base calls it, in a request and in a
batch, on the card at hand. Results are held against PyTorch's first: a kernel that is wrong is no contender."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from clinfast.ops import choices, registry
from clinfast.ops.packing import PackedBuffers, PackInto

HIDDEN, INNER, HEADS, VOCABULARY = 768, 3072, 12, 30522
# Lengths of the notes of a request and of a batch.
REQUEST, BATCH = [128], [32 + (97 * i) % 481 for i in range(32)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Ops of ids only, whatever the model's dtype; they run outside of graphs, so that host time is part of them.
OF_IDS = ("pack", "pack.into", "position_ids")
OPS = (
    *OF_IDS, "unpack", "embedding", "attention", "attention.first_token", "layer_norm", "gelu", "pooling",
    "linear.prepack",
)  # fmt: skip
ROUNDS, CALLS = 15, 10
# Largest difference from PyTorch's result, relative to its largest value, that is a rounding.
LARGEST_ERROR = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def of_ops() -> Iterator[tuple[str, torch.dtype, int | None]]:
    """(op, dtype, max_rows) of every choice to make: a linear is laid out before the sizes of its calls are known."""
    for op in OPS:
        sizes = (None,) if op == "linear.prepack" else (choices.REQUEST_ROWS, None)
        for dtype in (torch.float32,) if op in OF_IDS else DTYPES:
            yield from ((op, dtype, max_rows) for max_rows in sizes)


@functools.cache
def _inputs(of_request: bool, dtype: torch.dtype, device: str) -> dict[str, Any]:
    lengths = torch.tensor(REQUEST if of_request else BATCH)
    batch, seqlen, tokens = len(lengths), int(lengths.max()), int(lengths.sum())
    g = torch.Generator().manual_seed(0)

    def rows(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

    ids = torch.randint(0, VOCABULARY, (batch, seqlen), generator=g).to(device)
    mask = (torch.arange(seqlen) < lengths[:, None]).to(device, torch.int64)
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(device, torch.int32)
    indices = mask.flatten().nonzero().view(-1).int()
    qkv = rows(tokens, 3, HEADS, HIDDEN // HEADS)
    weight, shift = (torch.randn(HIDDEN, generator=g).to(device) for _ in "ab")
    x, residual = rows(tokens, HIDDEN), rows(tokens, HIDDEN)
    return {
        "pack": (ids, mask, None, VOCABULARY, 2, False),
        "position_ids": (ids, 1),
        "unpack": (x, indices, batch * seqlen, dtype),
        "embedding": (
            ids, None, indices, None, rows(VOCABULARY, HIDDEN), rows(512, HIDDEN), rows(2, HIDDEN), weight, shift,
            1e-12, 0, dtype,
        ),
        "attention": (*qkv.unbind(1), cu_seqlens, cu_seqlens, None, 0.125),
        "attention.first_token": (
            qkv[cu_seqlens[:-1].long(), 0], *qkv.unbind(1)[1:],
            torch.arange(batch + 1, dtype=torch.int32, device=device), cu_seqlens, None, 0.125,
        ),
        "layer_norm": (x, residual, weight, shift, 1e-12),
        "gelu": (rows(tokens, INNER), torch.randn(INNER, generator=g).to(device), "none"),
        "pooling": (x, cu_seqlens, "mean"),
        "linear": (rows(INNER, HIDDEN, scale=HIDDEN**-0.5), rows(INNER), x),
        "pack.into": (ids, mask, None, PackInto(VOCABULARY, 2, 0, None, False)),
    }  # fmt: skip


def call(
    op: str, dtype: torch.dtype, max_rows: int | None, backend: str, device: str = "cuda"
) -> Callable[[], Any] | None:
    """What `backend` runs for the op at this size, or None where it does not offer it."""
    try:
        function = registry.implementation(op, backend, device, prechecked=True)
    except RuntimeError:
        return None
    inputs = _inputs(max_rows is not None, dtype, device)
    if op == "linear.prepack":
        weight, bias, x = inputs["linear"]
        linear = function(weight, bias, dtype)
        return lambda: linear(x, "gelu")
    if op == "pack.into":
        ids, mask, types, constants = inputs[op]
        tokens, notes = int(mask.sum()), max(16, len(mask))
        buffers = PackedBuffers.of(tokens + 16, notes, ids.device)

        def pack_into() -> tuple[Tensor, ...]:
            function(ids, mask, types, constants, tokens + 16, notes, buffers)
            return buffers

        return pack_into
    return lambda: function(*inputs[op])


def agrees(ours: Any, theirs: Any, dtype: torch.dtype) -> bool:
    """Whether a result is PyTorch's, to within a few roundings; what `pack` leaves undefined is not looked at."""
    if isinstance(ours, tuple):
        facts = -1  # tokens first
        if not torch.equal(ours[facts], theirs[facts]):
            return False
        tokens = int(ours[facts][0])
        return all(torch.equal(a[:tokens], b[:tokens]) for a, b in zip(ours, theirs, strict=True) if len(a) >= tokens)
    if not ours.is_floating_point():
        return torch.equal(ours, theirs)
    exact = theirs.double()
    difference = (ours.double() - exact).abs().max()
    return bool(difference <= LARGEST_ERROR[dtype] * exact.abs().max())


def microseconds(run: Callable[[], Any], op: str) -> float:
    """Median of a call's time on the device; in a CUDA graph, as the engine runs it, where the host has no part."""
    if op not in OF_IDS and op != "unpack":
        run = _captured(run)
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        for _ in range(CALLS):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / CALLS * 1e3)
    return sorted(times)[ROUNDS // 2]


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # PyTorch's own attention asks for the lengths
        torch.cuda.synchronize()
        return run
    return graph.replay


def programmatic_launch() -> dict[str, float] | None:
    """Microseconds of a chain of our kernels, `"on"` and `"off"`; None where the card or the build has none of it."""
    from clinfast.backends.cuda import native

    if registry.unavailable("cuda") is not None or torch.cuda.get_device_capability() < (9, 0):
        return None
    _, _, q_inputs = (_inputs(True, torch.bfloat16, "cuda")[name] for name in ("layer_norm", "gelu", "attention"))
    norm = registry.implementation("layer_norm", "cuda", "cuda", prechecked=True)
    attend = registry.implementation("attention", "cuda", "cuda", prechecked=True)
    x, residual, weight, shift, eps = _inputs(True, torch.bfloat16, "cuda")["layer_norm"]

    def chain() -> Tensor:
        y = x
        for _ in range(24):
            y = norm(y, residual, weight, shift, eps)
            context = attend(y.view(len(y), HEADS, -1), *q_inputs[1:])
            y = context.view(len(y), -1)
        return y

    return {name: _with_programmatic_launch(native.kernels(), on, chain) for name, on in (("off", False), ("on", True))}


def _with_programmatic_launch(kernels: Any, on: bool, chain: Callable[[], Any]) -> float:
    with programmatic(kernels, on):
        return microseconds(chain, "chain")


@contextlib.contextmanager
def programmatic(kernels: Any, on: bool) -> Iterator[None]:
    """Programmatic dependent launch on or off for a while, then as it was chosen."""
    from clinfast.backends.cuda import native

    kernels.set_programmatic_launch(on)
    try:
        yield
    finally:
        kernels.set_programmatic_launch(native.wants_programmatic_launch())
