from __future__ import annotations

from typing import Any

from clinfast.bench.contenders.base import TorchContender


class Clinfast(TorchContender):
    name = "clinfast"
    distributions = ("clinfast", "torch", "transformers")

    def change(self, model: Any) -> Any:
        import clinfast

        # strict, so that a fallback raises: the stock path must never be timed under our name.
        return clinfast.optimize(model, strict=True)

    def describe(self) -> dict[str, Any]:
        import clinfast

        report = clinfast.report(self.model)
        if report.calls_stock or not report.calls_fast:
            raise RuntimeError(f"calls took the stock path: {report.fallbacks}")
        return {"isa": report.isa, "kernel_calls": report.kernel_calls}

    @property
    def version(self) -> str:
        import clinfast

        return str(getattr(clinfast, "__version__", super().version))
