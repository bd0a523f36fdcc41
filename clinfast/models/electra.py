"""ELECTRA: BERT's layers behind embeddings of their own width, heads of its own, no pooler."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

from clinfast.engine.spec import HeadActivation, Match
from clinfast.models import bert, checks, heads
from clinfast.models.reader import Family

HOME = "transformers.models.electra.modeling_electra"
# Where transformers keeps the class behind `sequence_summary`, by version.
SUMMARIES = ((HOME, "ElectraSequenceSummary"), ("transformers.modeling_utils", "SequenceSummary"))


def base(model: Any, family: Family) -> Match:
    reader = family.read(model, "", family)
    newer = "BaseModelOutputWithPastAndCrossAttentions"
    has_newer = hasattr(sys.modules[HOME], newer)
    return reader.match(heads.base_model(output=newer if has_newer else "BaseModelOutputWithCrossAttentions"))


def sequence_classification(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    head, size = family.check(model.classifier, "classifier", "ClassificationHead"), reader.spec.hidden_size
    checks.exact(head.dropout, "classifier.dropout", nn.Dropout)
    act = reader.activation(head, "classifier", "activation")
    dense = reader.dense("pooler", head.dense, "classifier.dense", size, activation=act)
    out = reader.dense("classifier", head.out_proj, "classifier.out_proj", dense.out_features)
    return reader.match(heads.sequence_classifier(dense, out))


def multiple_choice(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    summary, path = model.sequence_summary, "sequence_summary"
    checks.one_of(summary, path, SUMMARIES)
    checks.field(summary, path, "summary_type", ("first",))
    reader.constant(summary, "summary_type")
    for name in ("first_dropout", "last_dropout"):
        checks.one_of(
            getattr(summary, name),
            f"{path}.{name}",
            (("torch.nn.modules.dropout", "Dropout"), ("torch.nn.modules.linear", "Identity")),
        )
    act: HeadActivation = "none"
    if type(summary.activation) is not nn.Identity:
        act = reader.activation(summary, path, "activation")
    size = reader.spec.hidden_size
    dense = reader.dense("pooler", summary.summary, f"{path}.summary", size, activation=act)
    scorer = reader.dense("classifier", model.classifier, "classifier", dense.out_features)
    return reader.match(heads.multiple_choice(dense, bert.one_score(scorer, "classifier")))


def masked_lm(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    head, path = model.generator_predictions, "generator_predictions"
    family.check(head, path, "GeneratorPredictions")
    first = bert.lm_transform(reader, head, path, reader.activation(head, path, "activation"), "LayerNorm")
    decoder = reader.dense("decoder", model.generator_lm_head, "generator_lm_head", first.out_features)
    return reader.match(heads.masked_lm(first, decoder))


def pretraining(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    head, path = model.discriminator_predictions, "discriminator_predictions"
    family.check(head, path, "DiscriminatorPredictions")
    act = reader.activation(head, path, "activation")
    first = reader.dense("transform", head.dense, f"{path}.dense", reader.spec.hidden_size, activation=act)
    score = reader.dense("prediction", head.dense_prediction, f"{path}.dense_prediction", first.out_features)
    return reader.match(heads.electra_pretraining(HOME, first, bert.one_score(score, f"{path}.dense_prediction")))


CLASSES = bert.classes(
    Family("electra", HOME, "Electra", "electra", functools.partial(bert.BertReader, projects_embedding=True)),
    Model=base,
    ForSequenceClassification=sequence_classification,
    ForTokenClassification=bert.token_classification,
    ForQuestionAnswering=bert.question_answering,
    ForMultipleChoice=multiple_choice,
    ForMaskedLM=masked_lm,
    ForPreTraining=pretraining,
)
