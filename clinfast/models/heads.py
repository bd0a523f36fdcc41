"""What follows an encoder in transformers: its `HeadSpec`, and the stock output made from an `EncoderOutput`.

The output classes are imported when a head is made: a model of theirs exists by then.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from clinfast.engine.spec import Branch, Dense, EncoderOutput, HeadSpec, Request

BuildOutput = Callable[[EncoderOutput, Request], Any]


class Head(NamedTuple):
    """`per_token` names the fields of the output that are [B, S, ...]."""

    spec: HeadSpec
    build: BuildOutput
    per_token: tuple[str, ...] = ()


def output_class(name: str, home: str = "transformers.modeling_outputs") -> Any:
    return getattr(importlib.import_module(home), name)


def base_model(pooler: Dense | None = None, output: str = "BaseModelOutputWithPoolingAndCrossAttentions") -> Head:
    """No head: `last_hidden_state` [B, S, H], and `pooler_output` [B, H] where the model has a pooler."""
    make = output_class(output)
    branches = () if pooler is None else (Branch("first_token", (pooler,)),)

    def build(output: EncoderOutput, _: Request) -> Any:
        if output.branches:
            return make(last_hidden_state=output.hidden_states, pooler_output=output.branches[0])
        return make(last_hidden_state=output.hidden_states)

    return Head(HeadSpec("base", hidden_states=True, branches=branches), build, ("last_hidden_state",))


def _logits_only(spec: HeadSpec, output: str, per_token: bool) -> Head:
    make = output_class(output)

    def build(output: EncoderOutput, _: Request) -> Any:
        return make(logits=output.branches[0])

    return Head(spec, build, ("logits",) if per_token else ())


NoteRows = Literal["first_token", "first_real_token", "mean"]


def sequence_classifier(*layers: Dense, rows: NoteRows = "first_token") -> Head:
    """Dense layers on one row a note: `logits` [B, C]."""
    spec = HeadSpec("sequence_classification", branches=(Branch(rows, layers),))
    return _logits_only(spec, "SequenceClassifierOutput", per_token=False)


def next_sentence(*layers: Dense) -> Head:
    """Dense layers on the first token: `logits` [B, 2]."""
    spec = HeadSpec("next_sentence_prediction", branches=(Branch("first_token", layers),))
    return _logits_only(spec, "NextSentencePredictorOutput", per_token=False)


def token_classifier(*layers: Dense) -> Head:
    """Dense layers on every token: `logits` [B, S, C]."""
    spec = HeadSpec("token_classification", branches=(Branch("per_token", layers),))
    return _logits_only(spec, "TokenClassifierOutput", per_token=True)


def masked_lm(*layers: Dense) -> Head:
    """Dense layers on every token, the last one to the vocabulary: `logits` [B, S, V], or [P, V] at P positions."""
    spec = HeadSpec("masked_lm", branches=(Branch("per_token", layers, selectable=True),))
    return _logits_only(spec, "MaskedLMOutput", per_token=True)


def question_answering(*layers: Dense) -> Head:
    """Two scores for every token: `start_logits` and `end_logits` [B, S]."""
    make = output_class("QuestionAnsweringModelOutput")

    def build(output: EncoderOutput, _: Request) -> Any:
        start, end = output.branches[0].unbind(-1)
        return make(start_logits=start.contiguous(), end_logits=end.contiguous())

    spec = HeadSpec("question_answering", branches=(Branch("per_token", layers, pads="min"),))
    return Head(spec, build, ("start_logits", "end_logits"))


def multiple_choice(*layers: Dense, rows: NoteRows = "first_token") -> Head:
    """One score for each text [B, C, S]: `logits` [B, C]."""
    make = output_class("MultipleChoiceModelOutput")

    def build(output: EncoderOutput, request: Request) -> Any:
        assert request.num_choices is not None
        return make(logits=output.branches[0].view(-1, request.num_choices))

    return Head(HeadSpec("multiple_choice", branches=(Branch(rows, layers),), choices=True), build)


def pretraining(
    home: str, output: str, lm: tuple[Dense, ...], sentences: tuple[Dense, ...], field: str = "seq_relationship_logits"
) -> Head:
    """`prediction_logits` [B, S, V], and [B, 2] of a pair of sentences in `field`."""
    make = output_class(output, home)

    def build(output: EncoderOutput, _: Request) -> Any:
        prediction, relation = output.branches
        return make(**{"prediction_logits": prediction, field: relation})

    branches = (Branch("per_token", lm), Branch("first_token", sentences))
    return Head(HeadSpec("pretraining", branches=branches), build, ("prediction_logits",))


def electra_pretraining(home: str, *layers: Dense) -> Head:
    """Whether each token was replaced: `logits` [B, S]."""
    make = output_class("ElectraForPreTrainingOutput", home)

    def build(output: EncoderOutput, _: Request) -> Any:
        logits: Tensor = output.branches[0]
        return make(logits=logits.squeeze(-1))

    return Head(HeadSpec("pretraining", branches=(Branch("per_token", layers),)), build, ("logits",))
