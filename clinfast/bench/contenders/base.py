"""What the harness asks of a contender."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from clinfast.bench import cache
from clinfast.bench.cells import Batch
from clinfast.bench.reference import Outputs, arrays_of
from clinfast.bench.sources import ModelSource, load_stock


class CannotRun(RuntimeError):
    """This contender does not serve this model; the text says why."""


class Contender(ABC):
    """One way to run a model, in a process of its own. It imports its runtime inside methods only."""

    name: ClassVar[str]
    distributions: ClassVar[tuple[str, ...]]
    """Packages whose versions decide its result; the first is the one that the tables show."""
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    has_outputs: ClassVar[bool] = True
    """False for a floor, which has no output to compare and is left out of the race for the fastest."""

    compiles_at_first_call: ClassVar[bool] = False

    def __init__(self, source: ModelSource, precision: str, threads: int) -> None:
        self.source = source
        self.precision = precision
        self.threads = threads
        self.notes: dict[str, Any] = {}

    @classmethod
    def build(cls, source: ModelSource, precision: str, folder: Path) -> None:
        """Writes the exported model into `folder`. Runs in a process that ends afterwards."""
        raise NotImplementedError(f"{cls.name} exports nothing")

    def artefact(self) -> Path:
        """The folder that `build` wrote, from the cache where it can."""
        facts = cache.key(
            model=self.source.identity,
            recipe=self.build_recipe,
            versions={name: cache.version(name) for name in (*self.distributions, "torch", "transformers")},
        )
        return cache.ensure(
            cache.root() / "exported" / f"{self.name}-{self.source.name}-{self.precision}-{facts}",
            "artefact", self.name, self.source.name, str(self.source.folder), self.precision,
            threads=self.threads,
        )  # fmt: skip

    build_recipe: ClassVar[int] = 1
    """Raise it when `build` changes, so that old exports are not used again."""

    @classmethod
    def missing(cls) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [name for name in cls.distributions if cache.version(name) == "absent"]

    @property
    def version(self) -> str:
        return cache.version(self.distributions[0])

    @abstractmethod
    def load(self) -> None:
        """Makes the model ready to run."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Callable[[], Any]:
        """A call that runs the model once on `batch`; converting the inputs is not part of it."""

    def describe(self) -> dict[str, Any]:
        """Facts about how it runs, for the result file. Asked after the first call."""
        return self.notes

    @abstractmethod
    def outputs(self, raw: Any) -> Outputs:
        """The result of one call as arrays under stock's names: `last_hidden_state` [batch, length, hidden], ..."""


class TorchContender(Contender):
    """A contender that runs the transformers model, stock or changed."""

    precisions = ("fp32", "bf16")

    def load(self) -> None:
        import torch

        torch.set_num_threads(self.threads)
        torch.set_num_interop_threads(1)
        self.model: Any = self.change(load_stock(self.source, self.precision))

    def change(self, model: Any) -> Any:
        return model

    def prepare(self, batch: Batch) -> Callable[[], Any]:
        import torch

        inputs = {name: torch.from_numpy(array) for name, array in batch.of(self.source.inputs).items()}
        model = self.model

        def call() -> Any:
            with torch.inference_mode():
                return model(**inputs)

        return call

    def outputs(self, raw: Any) -> Outputs:
        return arrays_of(raw)
