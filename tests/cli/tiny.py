"""A tiny saved model with a WordPiece tokenizer of its own, and texts in its vocabulary."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import bert_models
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["pain", "in", "left", "flank", "since", "monday", "fever", "bp", "dolor", "y", "fiebre", "desde", "ayer"]
LONGEST = 64


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: place for place, word in enumerate([*SPECIAL, *WORDS, *map(str, range(10)), "##s", "##0"])}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocab[name]) for name in ("[CLS]", "[SEP]")]
    )
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=LONGEST, **{f"{name}_token": word for name, word in names.items()}
    )


def save(folder: Path, head: str = "token", *, with_tokenizer: bool = True, **fields: Any) -> Path:
    logging.disable_progress_bar()
    bert_models.make(head, **fields).save_pretrained(folder)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder


def texts(lengths: tuple[int, ...] = (3, 9, 14, 20, 33, 50), seed: int = 0) -> list[str]:
    """One text a length, in words."""
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(length)) for length in lengths]
