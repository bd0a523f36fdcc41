"""The user's texts as token ids, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clinfast.model_folder import BadInput, ModelFolder

EDGES = (16, 64, 128, 256, 512)


@dataclass(frozen=True)
class Notes:
    """Notes in order of length.

    Attributes:
        encoded: of each note, what the tokenizer returns: lists of the same length by name.
        longest: tokens that a note may have; `cut` notes had more.
    """

    encoded: list[dict[str, list[int]]]
    tokenizer: Any
    longest: int
    cut: int

    def __len__(self) -> int:
        return len(self.encoded)

    def length(self, note: int) -> int:
        return len(self.encoded[note]["input_ids"])

    def buckets(self) -> Iterator[tuple[str, list[int]]]:
        """Ranges of lengths that hold notes, and which ones; each goes up to its edge."""
        low = 1
        for high in [edge for edge in EDGES if edge < self.longest] + [self.longest]:
            found = [note for note in range(len(self)) if low <= self.length(note) <= high]
            if found:
                yield f"{low}-{high}", found
            low = high + 1

    def padded(self, notes: Sequence[int], length: int | None = None) -> dict[str, Tensor]:
        """Model inputs [notes, length], padded on the right; to the longest of them if no length is given."""
        fields = {name: [self.encoded[note][name] for note in notes] for name in self.encoded[0]}
        kind = "longest" if length is None else "max_length"
        return dict(self.tokenizer.pad(fields, padding=kind, max_length=length, return_tensors="pt"))


def tokenize(texts: Sequence[str], tokenizer: Any, folder: ModelFolder, max_length: int | None) -> Notes:
    """
    Raises:
        BadInput: `max_length` is more than the model takes, or the tokenizer is another model's.
    """
    longest = folder.longest
    if max_length is not None and max_length > longest:
        raise BadInput(f"--max-length {max_length}: this model takes at most {longest} tokens")
    special = tokenizer.num_special_tokens_to_add()
    if max_length is not None and max_length <= special:
        raise BadInput(f"--max-length {max_length}: the {special} special tokens leave no room for a text")
    longest = max_length or longest
    whole = tokenizer(list(texts), truncation=False, return_attention_mask=False)["input_ids"]
    cut = sum(len(ids) > longest for ids in whole)
    encoding = tokenizer(list(texts), truncation=True, max_length=longest, return_attention_mask=True)
    encoded = [{name: encoding[name][note] for name in encoding} for note in range(len(texts))]
    highest = max(max(note["input_ids"], default=0) for note in encoded)
    if highest >= folder.vocab_size:
        raise BadInput(
            f"the tokenizer in {folder.folder} gives the id {highest}, but the model has {folder.vocab_size} "
            "embeddings: it belongs to another model"
        )
    encoded.sort(key=lambda note: len(note["input_ids"]))
    return Notes(encoded, tokenizer, longest, cut)
