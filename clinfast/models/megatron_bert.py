"""Megatron-BERT (GatorTron, BioMegatron): BERT's names and heads, pre-norm, no LayerNorm after the embedding."""

from __future__ import annotations

import functools

from clinfast.models import bert
from clinfast.models.reader import Family

HOME = "transformers.models.megatron_bert.modeling_megatron_bert"

read = functools.partial(bert.BertReader, norms=bert.Norms("attention.ln", "ln", embedding=False, final="encoder.ln"))

CLASSES = bert.classes(Family("megatron-bert", HOME, "MegatronBert", "bert", read), **bert.HEADS)
