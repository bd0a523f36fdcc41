"""Small model folders: tokenizers that know every character of the texts, models with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bert_models import ids, make
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["pt", "pain", "chest", "fever", "dr", "garc", "ana", "con", "niega", "##ia", "##ed", "##ing", "##s"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;/-()%#?!'+"
LABELS = ["O", "B-NAME", "I-NAME", "B-AGE", "I-AGE"]

NOTES = {
    "plain.txt": "Pt c/o chest pain x 3 days, denies fever.",
    "accents.txt": "Paciente: Ana García Núñez, 74 años. Niega fiebre.\r\n\tDr. Muñoz\r\n",
    "long.txt": "Pt seen by Dr. García in the ED.\r\n\tPlan: pain control, fever watch; niega dolor.\n" * 9,
    "tiny.txt": "ok",
    "deep/upper.TXT": "Ana, 12:30, pain 3/10",
    "deep/cafe\u0301.txt": "Sen\u0303ora Garci\u0301a con fiebre",
}


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's: lower case, no accents."""
    vocabulary = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return _wrap(tokenizer)


def bytelevel() -> PreTrainedTokenizerFast:
    """As RoBERTa's, one byte a token: a character may be several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2), add_prefix_space=False)
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def model_folder(
    folder: Path, head: str, labels: list[str] | None = None, tokenizer: Any = None, **fields: Any
) -> Path:
    """Saves a random BERT with that head and a tokenizer (WordPiece) in `folder`."""
    tokenizer = tokenizer or wordpiece()
    if labels is not None:
        fields |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    model = make(head, vocab_size=len(tokenizer), **fields)
    if labels is not None:
        _spread(model, len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def _spread(model: Any, vocabulary: int) -> None:
    """Without its mean logits, a random head gives all of its labels rather than one or two."""
    logits = model(ids(32, 24, vocab=vocabulary)).logits
    model.classifier.bias -= logits.flatten(0, -2).mean(0)


def write_notes(folder: Path) -> Path:
    for name, text in NOTES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder
