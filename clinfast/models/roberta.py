"""RoBERTa and its twins, two of them pre-norm: BERT's layers, counted positions, heads of their own."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from clinfast.engine.spec import Match
from clinfast.models import bert, checks, heads
from clinfast.models.reader import Family

read = functools.partial(bert.BertReader, counts_positions=True)
read_prelayernorm = functools.partial(
    read, norms=bert.Norms("attention.LayerNorm", "intermediate.LayerNorm", final="LayerNorm")
)
read_xl = functools.partial(
    read, norms=bert.Norms("attention.self_attn_layer_norm", "LayerNorm", embedding=False, final="encoder.LayerNorm")
)


def sequence_classification(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    head, size = family.check(model.classifier, "classifier", "ClassificationHead"), reader.spec.hidden_size
    checks.exact(head.dropout, "classifier.dropout", nn.Dropout)
    dense = reader.dense("pooler", head.dense, "classifier.dense", size, activation="tanh")
    out = reader.dense("classifier", head.out_proj, "classifier.out_proj", dense.out_features)
    return reader.match(heads.sequence_classifier(dense, out))


def masked_lm(model: Any, family: Family) -> Match:
    reader = family.base_of(model)
    head = family.check(model.lm_head, "lm_head", "LMHead")
    first = bert.lm_transform(reader, head, "lm_head", "gelu", "layer_norm")
    decoder = reader.dense("decoder", head.decoder, "lm_head.decoder", first.out_features)
    return reader.match(heads.masked_lm(first, decoder))


CLASSES = {
    name: recognise
    for family in (
        Family("roberta", "transformers.models.roberta.modeling_roberta", "Roberta", "roberta", read),
        Family(
            "xlm-roberta", "transformers.models.xlm_roberta.modeling_xlm_roberta", "XLMRoberta", "roberta", read
        ),
        Family("camembert", "transformers.models.camembert.modeling_camembert", "Camembert", "roberta", read),
        Family(
            "roberta-prelayernorm", "transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm",
            "RobertaPreLayerNorm", "roberta_prelayernorm", read_prelayernorm,
        ),
        Family(
            "xlm-roberta-xl", "transformers.models.xlm_roberta_xl.modeling_xlm_roberta_xl", "XLMRobertaXL", "roberta",
            read_xl,
        ),
    )
    for name, recognise in bert.classes(
        family,
        Model=bert.base,
        ForSequenceClassification=sequence_classification,
        ForTokenClassification=bert.token_classification,
        ForQuestionAnswering=bert.question_answering,
        ForMultipleChoice=bert.multiple_choice,
        ForMaskedLM=masked_lm,
    ).items()
}
