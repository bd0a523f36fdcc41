"""What follows an encoder in transformers: its `HeadSpec`, and the stock output made from an `EncoderOutput`.

The makers import transformers when called: a model of theirs exists by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clinfast.engine.spec import EncoderOutput, HeadSpec

BuildOutput = Callable[[EncoderOutput], Any]


def base_model(*, pooler: bool) -> tuple[HeadSpec, BuildOutput]:
    """No head: `last_hidden_state` [B, S, H], and `pooler_output` [B, H] where the model has a pooler."""
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

    def build(output: EncoderOutput) -> BaseModelOutputWithPoolingAndCrossAttentions:
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=output.hidden_states, pooler_output=output.pooled
        )

    return HeadSpec("none", pooler=pooler), build


def sequence_classifier() -> tuple[HeadSpec, BuildOutput]:
    """Pooler and linear on the first token: `logits` [B, C]."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    def build(output: EncoderOutput) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=output.logits)

    return HeadSpec("first_token", pooler=True, classifier=True), build


def token_classifier() -> tuple[HeadSpec, BuildOutput]:
    """A linear on every token: `logits` [B, S, C]."""
    from transformers.modeling_outputs import TokenClassifierOutput

    def build(output: EncoderOutput) -> TokenClassifierOutput:
        return TokenClassifierOutput(logits=output.logits)

    return HeadSpec("per_token", classifier=True), build
