"""What the exporters of several contenders share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("last_hidden_state", "pooler_output")


def positional(model: Any) -> torch.nn.Module:
    """`model` with three tensors in and two out, as tracers want it, in eval mode."""
    import torch

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> tuple[Any, Any]:
            outputs = self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            )
            return outputs.last_hidden_state, outputs.pooler_output

    return Positional().eval()


def example_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two notes of which one is padded, so that a tracer cannot take the mask for constant."""
    import torch

    input_ids = torch.randint(1000, 2000, (2, 16))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 10:] = 0
    return input_ids, attention_mask, torch.zeros_like(input_ids)
