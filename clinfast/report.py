"""What `report`, `verify` and `info` hand to the user."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class UnitReport:
    """One optimized (or refused) module.

    `canary_error` is the largest absolute difference from stock on the canary batch; `refused` says why the module
    was left stock, and is None where it was not; `verified` is what `verify` last found.
    """

    path: str
    class_name: str
    calls_fast: int
    calls_stock: int
    fallbacks: dict[str, int]
    facts: dict[str, Any]
    canary_error: float | None
    refused: str | None
    verified: Verification | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What runs how: per module, in total, and the kernel calls of this process by op and backend.

    `substitutes` says in sentences which backend serves an op in the place of the chosen one, and why.
    """

    units: tuple[UnitReport, ...]
    kernel_calls: dict[str, int]
    isa: str | None
    substitutes: tuple[str, ...] = ()

    @property
    def calls_fast(self) -> int:
        return sum(unit.calls_fast for unit in self.units)

    @property
    def calls_stock(self) -> int:
        return sum(unit.calls_stock for unit in self.units)

    @property
    def fallbacks(self) -> dict[str, int]:
        total: collections.Counter[str] = collections.Counter()
        for unit in self.units:
            total.update(unit.fallbacks)
        return dict(total)

    def __str__(self) -> str:
        if not self.units:
            return "clinfast: nothing here is optimized"
        lines = [f"clinfast: {self.calls_fast} fast calls, {self.calls_stock} stock calls"]
        for unit in self.units:
            name = f"{unit.class_name} ({unit.path})" if unit.path else unit.class_name
            if unit.refused is not None:
                lines.append(f"  {name}: left stock: {unit.refused}")
                continue
            facts = unit.facts
            lines.append(
                f"  {name}: {facts['family']}, {facts['layers']} layers of {facts['hidden_size']}, head "
                f"{facts['head']}, computed in {facts['compute_dtype']}, padding {facts['padding']}"
            )
            same_bits = "proved on this machine" if facts["reproducible"] else "not proved on this machine"
            linears = facts["linear"] or "packed at the next call"
            lines.append(
                f"    linears: {linears}; kernels: {self.isa or 'torch'}; extra memory "
                f"{facts['packed_bytes'] / 2**20:.0f} MiB; same note, same bits: {same_bits}"
            )
            graphs = facts.get("graphs")
            if graphs is not None:
                state = f"off: {graphs['off']}" if graphs["off"] else f"{graphs['bytes'] / 2**20:.0f} MiB"
                lines.append(
                    f"    CUDA graphs: {graphs['captured']} captured, {graphs['replays']} replays, {state}"
                )
                lines += [f"    {count} x op by op: {why}" for why, count in sorted(graphs["op_by_op"].items())]
            if unit.canary_error is not None:
                lines.append(f"    largest difference from stock on the canary batch: {unit.canary_error:.1e}")
            if unit.verified is not None:
                lines.append(
                    f"    error against float64 as verify measured it: ours {unit.verified.ours_error:.1e}, stock "
                    f"{unit.verified.stock_error:.1e}"
                )
            lines += [f"    {count} x stock: {reason}" for reason, count in sorted(unit.fallbacks.items())]
        lines += [f"  {sentence}" for sentence in self.substitutes]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Verification:
    """Ours and stock on the user's own inputs.

    `max_difference` is the largest absolute difference between ours and stock over real tokens; `ours_error` and
    `stock_error` are both taken against the same model in float64, stock's in the precision that ours computes in
    where that is lower than the model's own. `label_agreement` is the share of equal argmax
    over the logits, None for a model without them; `cosine` the smallest similarity of output rows.
    """

    passed: bool
    tolerance: float | None
    max_difference: float
    ours_error: float
    stock_error: float
    cosine: float
    label_agreement: float | None
    batches: int
    fallbacks: dict[str, int]

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        rule = (
            "ours at most twice stock's own error"
            if self.tolerance is None
            else f"difference at most {self.tolerance:g}"
        )
        lines = [
            f"clinfast verify: {'passed' if self.passed else 'FAILED'} over {self.batches} batches ({rule})",
            f"  error against float64: ours {self.ours_error:.2e}, stock {self.stock_error:.2e}",
            f"  ours against stock: largest difference {self.max_difference:.2e}, smallest cosine {self.cosine:.7f}",
        ]
        if self.label_agreement is not None:
            lines.append(f"  labels that agree: {self.label_agreement:.2%}")
        lines += [f"  {count} x stock: {reason}" for reason, count in sorted(self.fallbacks.items())]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Info:
    """What this machine has: processor, instruction set of the kernels, threads, versions, backends."""

    cpu: str
    isa: str
    isas: tuple[str, ...]
    threads: int
    cores: int
    backends: dict[str, str]
    versions: dict[str, str]
    attention_interface: str

    def __str__(self) -> str:
        lines = [
            f"processor   {self.cpu}, {self.cores} cores, {self.threads} threads",
            f"kernels     {self.isa}" + (f" (also here: {', '.join(self.isas[1:])})" if len(self.isas) > 1 else ""),
        ]
        lines += [f"{'backend ' + name:<11} {state}" for name, state in self.backends.items()]
        lines.append(f"attention   {self.attention_interface}")
        lines.append("versions    " + ", ".join(f"{name} {version}" for name, version in self.versions.items()))
        return "\n".join(lines)
