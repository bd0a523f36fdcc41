"""`clinfast tune`: time the kernels' tiles, and the backends against each other, on this machine's own card, and write
the table that serves it best."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from clinfast.model_folder import BadInput
from clinfast.ops import choices, registry
from clinfast.triton_kernels import configs

Timer = Callable[[Callable[[], Any]], float]
ROWS = (64, 1024, None)
# What is reasoned stays where something else measures faster by less.
NOISE = 0.03
ATTENTION = [
    {"block_m": m, "block_n": n, "num_warps": w, "num_stages": s}
    for m, n, w, s in itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    if m * n <= 64 * w * 32
]


def linear_candidates(tma: bool) -> list[dict[str, Any]]:
    return [
        {"block_m": m, "block_n": n, "block_k": k, "group_m": 8, "num_warps": w, "num_stages": s, "tma": tma}
        for m, n, k, w, s in itertools.product((64, 128), (64, 128, 256), (32, 64), (4, 8), (3, 4))
        if m * n <= 64 * w * 32
    ]


def best(candidates: Iterable[dict[str, Any]], call: Callable[[dict[str, Any]], Any], timer: Timer) -> dict[str, Any]:
    """The fastest candidate that runs: some take more shared memory or registers than the card has."""
    times: list[tuple[float, int, dict[str, Any]]] = []
    for at, candidate in enumerate(candidates):
        try:
            times.append((timer(lambda candidate=candidate: call(candidate)), at, candidate))  # type: ignore[misc]
        except Exception as error:
            last = error
    if not times:
        raise BadInput(f"no tiles run on this card: {last}")
    return min(times)[2]


def tune(
    of_class: int,
    card: str,
    shapes: list[tuple[int, int]],
    head_dims: list[int],
    attend: Callable[[int, str, dict[str, Any]], Any],
    multiply: Callable[[int, int, int | None, dict[str, Any]], Any],
    library: Callable[[int, int], Any],
    timer: Timer,
) -> dict[str, Any]:
    """A table for the card, from the shipped one of its class.

    Args:
        attend: runs attention of `(head_dim, kind)` with some tiles.
        multiply: runs our product of `(in_features, out_features, rows)` with some tiles.
        library: runs the library's product and a GELU of its own, for `(in_features, out_features)`.
        timer: seconds of a call.
    """
    table = copy.deepcopy(configs.read(configs.TABLES / f"sm_{of_class}.json"))
    table |= {"card": card, "measured": True}
    for head_dim, kind in itertools.product(head_dims, ("long", "short", "few")):
        width = next(block for block in (16, 32, 64, 128, 256) if head_dim <= block)
        candidates = [c for c in ATTENTION if (c["block_m"] == 16) == (kind == "few")]
        entry = table["attention"].setdefault(f"16 bit, head_dim {width}", {})
        entry[kind] = best(candidates, lambda tiles, d=head_dim, k=kind: attend(d, k, tiles), timer)  # type: ignore[misc]
    for in_features, out_features in shapes:
        tiles = [
            {
                "max_rows": rows,
                "tiles": best(
                    linear_candidates(of_class >= 90),
                    lambda tiles, k=in_features, n=out_features, m=rows: multiply(k, n, m, tiles),  # type: ignore[misc]
                    timer,
                ),
            }
            for rows in ROWS
        ]
        ours = timer(lambda k=in_features, n=out_features, t=tiles[-1]["tiles"]: multiply(k, n, None, t))  # type: ignore[misc]
        theirs = timer(lambda k=in_features, n=out_features: library(k, n))  # type: ignore[misc]
        fused = ["gelu", "gelu_tanh", "relu"] if ours < theirs else []
        table["linear"][f"{in_features} x {out_features}"] = {"fused": fused, "tiles": tiles}
    return table


def choose(
    of_ops: Iterable[tuple[str, torch.dtype, int | None]],
    names: list[str],
    calls: Callable[[str, torch.dtype, int | None, str], Callable[[], Any] | None],
    agrees: Callable[[Any, Any, torch.dtype], bool],
    microseconds: Callable[[Callable[[], Any], str], float],
    capability: tuple[int, int],
) -> tuple[list[dict[str, Any]], list[str]]:
    """The fastest backend of each op, dtype and size, and sentences on those that had to be left out.

    The one that the table of reasons has in front stays there unless another is faster by more than `NOISE`.

    Args:
        names: backends, of which "torch" is the measure of what is right.
        calls: what a backend runs, or None where it does not offer the op.
        microseconds: of a call.
    """
    rows, left_out = [], []
    for op, dtype, max_rows in of_ops:
        times: dict[str, float] = {}
        right = calls(op, dtype, max_rows, "torch")
        for name in names:
            call = right if name == "torch" else calls(op, dtype, max_rows, name)
            if call is None:
                continue
            size = "of any size" if max_rows is None else f"up to {max_rows} tokens"
            of_size = f"{name} for {op} in {dtype} {size}"
            try:
                if right is not None and call is not right and not agrees(call(), right(), dtype):
                    left_out.append(f"{of_size}: its result is not PyTorch's")
                    continue
                times[name] = microseconds(call, op)
            except Exception as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                left_out.append(f"{of_size}: {first}")
        if len(times) < 2:
            continue
        reasoned = choices.ranked(op, list(times), dtype, capability, max_rows)[0]
        best = min(times, key=times.__getitem__)
        if times[best] > times[reasoned] * (1 - NOISE):
            best = reasoned
        rows.append(choices.measured_row(op, dtype, max_rows, times, best))
    return rows, left_out


def run(options: argparse.Namespace) -> int:
    reasons = {name: registry.unavailable(name) for name in ("triton", "cuda")}
    if None not in reasons.values():
        raise BadInput("there is nothing to tune: " + "; ".join(dict.fromkeys(map(str, reasons.values()))))
    from clinfast.backends import racing
    from clinfast.backends.triton import device, timing

    shapes = [_shape(text) for text in options.linear]
    index = device.current()
    of_class, card = device.device_class(index), timing.card(index)
    if reasons["triton"] is None and not options.skip_tiles:
        table = tune(
            of_class, card, shapes, options.head_dims, timing.attend, timing.multiply, timing.library, timing.seconds
        )
    else:
        table = configs.read(configs.TABLES / f"sm_{of_class}.json") | {"card": card}
        print(f"tiles are left as they were: {reasons['triton'] or '--skip-tiles'}", file=sys.stderr)
    names = [name for name in registry.order("auto", "cuda") if reasons.get(name) is None]
    with torch.no_grad():
        table["backends"], left_out = choose(
            racing.of_ops(), names, racing.call, racing.agrees, racing.microseconds, choices.capability()
        )
        programmatic = racing.programmatic_launch()
    if programmatic is not None:
        chosen = programmatic["on"] < programmatic["off"] * (1 - NOISE)
        table["programmatic_launch"] = {"microseconds": programmatic, "chosen": chosen}
    for sentence in left_out:
        print(f"left out: {sentence}", file=sys.stderr)
    path: Path = options.output
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + f".{os.getpid()}")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    partial.replace(path)
    print(f"{card}: {path}\nto use it: export CLINFAST_TUNING_TABLE={path.resolve()}", file=sys.stderr)
    return 0


def _shape(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise BadInput(f"--linear {text!r} is not IN_FEATURESxOUT_FEATURES, as 768x3072")
    return int(parts[0]), int(parts[1])
