"""What the exporters of several contenders share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinfast.bench.reference import arrays_of
from clinfast.bench.sources import ModelSource

if TYPE_CHECKING:
    import torch

NAMES = "outputs.json"


def positional(model: Any, source: ModelSource, folder: Path) -> torch.nn.Module:
    """`model` with tensors in and a tuple of tensors out, as tracers want it; their names go into `folder`."""
    import torch

    with torch.inference_mode():
        names = list(arrays_of(model(**dict(zip(source.inputs, example_inputs(source), strict=True)))))
    (folder / NAMES).write_text(json.dumps(names))

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

    class WithTokenTypes(Positional):
        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> tuple[Any, ...]:
            outputs = self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            )
            return tuple(outputs[name] for name in names)

    class WithoutTokenTypes(Positional):
        def forward(self, input_ids: Any, attention_mask: Any) -> tuple[Any, ...]:
            outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
            return tuple(outputs[name] for name in names)

    return (WithTokenTypes() if "token_type_ids" in source.inputs else WithoutTokenTypes()).eval()


def output_names(folder: Path) -> list[str]:
    names: list[str] = json.loads((folder / NAMES).read_text())
    return names


def example_inputs(source: ModelSource) -> tuple[torch.Tensor, ...]:
    """Two notes of which one is padded, so that a tracer cannot take the mask for constant."""
    import torch

    length = min(16, source.longest)
    input_ids = torch.randint(source.vocab_size // 2, source.vocab_size, (2, length))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, length // 2 :] = 0
    input_ids = torch.where(attention_mask.bool(), input_ids, source.pad_id)
    return (input_ids, attention_mask, torch.zeros_like(input_ids))[: len(source.inputs)]
