"""Whole models on a GPU against eager SDPA, torch.compile (max-autotune, CUDA graphs) and torch's varlen attention.

Each cell first holds every contender to the error budget, then times them in alternating rounds: `synchronous`, one
call and a wait, which is what a single request sees; and `throughput`, calls one after the other. Host time is in both.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from card_monitor import Monitor
from gpu_timing import NO_GPU, copy_bytes_per_second, matmul_flops_per_second, milliseconds
from model_cases import MODELS, cells, compiled, first_tensor, flops, inputs, model, varlen

from clinfast import patch
from clinfast.rounded import rounded_stock

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=NO_GPU or "")]
ROUNDS, CALLS = 9, 10
OURS = "clinfast"
CHECKED_NOTES = 4


def contenders(name: str) -> dict[str, Any]:
    """Those that can be built here, and, as text, why the others could not."""
    import clinfast
    from clinfast.engine.precision import fp8_refusal

    stock = model(name)
    found: dict[str, Any] = {"eager": stock}
    for label, options in (
        (OURS, {}),
        (f"{OURS} padded", {"padding": "keep"}),
        (f"{OURS} reproducible", {"reproducible": True}),
        (f"{OURS} fp8", {"precision": "fp8"}),
    ):
        if label.endswith("fp8") and (reason := fp8_refusal("cuda")) is not None:
            found[label] = reason
            continue
        try:
            found[label] = clinfast.optimize(copy.deepcopy(stock), inference_only=True, strict=True, **options)
        except Exception as refusal:
            if label == OURS:
                raise
            found[label] = str(refusal)
    try:
        found["varlen"] = "its heads are left out" if name == "distilbert-qa" else varlen(stock)
    except ImportError as missing:
        found["varlen"] = str(missing)
    found["compile"] = compiled(stock)
    return found


@pytest.fixture(scope="module", params=MODELS)
def running(request):
    yield request.param, contenders(request.param)
    torch.cuda.empty_cache()


def real_rows(output: Any, mask: torch.Tensor) -> torch.Tensor:
    return first_tensor(output)[mask.bool()].double()


def hold_to_budget(
    label: str, call: Callable[..., Any], stock: Any, exact: Any, batch: dict[str, torch.Tensor]
) -> float:
    """Root mean square error relative to the result's; at most twice eager's own, fp8's that of eager in fp8."""
    mask = batch["attention_mask"]
    truth = real_rows(exact(**batch), mask)
    size = truth.square().mean().sqrt()
    if label.endswith("fp8"):
        ((_, _, forward),) = patch.find_patched(call)
        stock = rounded_stock(call, forward.encoder)
    ours, eager = ((real_rows(c(**batch), mask) - truth).square().mean().sqrt() / size for c in (call, stock))
    budget = 2 * eager.item() + 2.0**-9
    assert ours.item() <= budget, f"{label}: error {ours.item():.2e}, budget {budget:.2e}"
    return ours.item()


def synchronous(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


@pytest.mark.parametrize("cell", cells())
def bench_model(benchmark, running, cell):
    name, found = running
    lengths = cells()[cell]
    batch, few = inputs(lengths), inputs(sorted(lengths)[-CHECKED_NOTES:])
    missing = {label: c for label, c in found.items() if isinstance(c, str)}
    calls: dict[str, Callable[..., Any]] = {label: c for label, c in found.items() if not isinstance(c, str)}
    exact = copy.deepcopy(found["eager"]).double()
    errors: dict[str, float] = {}
    with torch.inference_mode():
        for label in [label for label in calls if not label.startswith(OURS) and label != "eager"]:
            try:
                calls[label](**few if label != "compile" else batch)
            except Exception as error:  # a peer that does not run here is left out by name
                missing[label] = (str(error).strip().splitlines() or [type(error).__name__])[0]
                del calls[label]
        times = {label: ([], []) for label in calls}
        for label, call in calls.items():
            # torch.compile is held to it on the whole batch, lest it compile for one shape more.
            errors[label] = hold_to_budget(label, call, found["eager"], exact, batch if label == "compile" else few)
        del exact
        bound = {label: (lambda call=call: call(**batch)) for label, call in calls.items()}
        for call in bound.values():
            for _ in range(3):
                call()
        with Monitor() as seen:
            for _ in range(ROUNDS):
                for label, call in bound.items():
                    times[label][0].append(statistics.median(synchronous(call) for _ in range(3)))
                    times[label][1].append(milliseconds(call, CALLS))
        benchmark.pedantic(bound[OURS], rounds=3, iterations=CALLS, warmup_rounds=1)
    medians = {
        label: {"synchronous": statistics.median(a), "throughput": statistics.median(b)}
        for label, (a, b) in times.items()
    }
    work = flops(name, lengths)
    benchmark.extra_info.update(
        model=name, cell=cell, lengths=lengths, card=torch.cuda.get_device_name(), milliseconds=medians, errors=errors,
        missing=missing, copy_bytes_per_second=copy_bytes_per_second(),
        matmul_flops_per_second=matmul_flops_per_second(), flops=work,
        utilisation=work / (medians[OURS]["throughput"] / 1e3) / matmul_flops_per_second(), card_state=seen.summary(),
        spread={label: (max(b) - min(b)) / statistics.median(b) for label, (_, b) in times.items()},
    )  # fmt: skip
