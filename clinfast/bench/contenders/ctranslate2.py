from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np

from clinfast.bench.cells import Batch
from clinfast.bench.contenders.base import CannotRun, Contender
from clinfast.bench.reference import Outputs
from clinfast.bench.sources import ModelSource


class CTranslate2(Contender):
    """Converted from the saved folder. It is fed ids and lengths, and removes padding itself."""

    name = "ctranslate2"
    distributions = ("ctranslate2",)
    compute_type: ClassVar[str] = "float32"

    @classmethod
    def build(cls, source: ModelSource, precision: str, folder: Path) -> None:
        from ctranslate2.converters import TransformersConverter

        with TemporaryDirectory() as scratch:
            for file in source.folder.resolve().iterdir():
                (Path(scratch) / file.name).symlink_to(file)
            # transformers 5 writes no position_embedding_type any more; the converter asks for it.
            config = Path(scratch) / "config.json"
            config.unlink()
            config.write_text(json.dumps({"position_embedding_type": "absolute", **source.config}))
            TransformersConverter(scratch).convert(str(folder), force=True)

    def load(self) -> None:
        import ctranslate2

        if not self.source.architecture.endswith("Model"):
            raise CannotRun(f"it runs encoders without a head, and this is a {self.source.architecture}")
        self.encoder = ctranslate2.Encoder(
            str(self.artefact()), device="cpu", compute_type=self.compute_type, intra_threads=self.threads
        )
        self.notes["compute_type"] = self.encoder.compute_type

    def prepare(self, batch: Batch) -> Callable[[], Any]:
        from ctranslate2 import StorageView

        encoder = self.encoder
        ids = np.ascontiguousarray(batch.input_ids, dtype=np.int32)
        lengths = np.ascontiguousarray(batch.lengths, dtype=np.int32)
        return lambda: encoder.forward_batch(StorageView.from_array(ids), StorageView.from_array(lengths))

    def outputs(self, raw: Any) -> Outputs:
        found = {"last_hidden_state": np.array(raw.last_hidden_state)}
        if raw.pooler_output is not None:
            found["pooler_output"] = np.array(raw.pooler_output)
        return found


class CTranslate2Int8(CTranslate2):
    name = "ctranslate2_int8"
    compute_type = "int8"
