"""Notes to windows of tokens, and windows to batches under a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import Problem
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A piece of a note as the model gets it, special tokens included.

    `note` is the index of its note; `offsets` are [start, end) in characters of the whole note, (0, 0) without a fast
    tokenizer; `special` marks what the tokenizer added; `words` numbers the note's words, None at special tokens;
    `cut` says that the note goes on, and nothing reads the rest.
    """

    note: int
    ids: list[int]
    types: list[int] | None
    offsets: list[tuple[int, int]]
    special: list[int]
    words: list[int | None]
    cut: bool = False

    def __len__(self) -> int:
        return len(self.ids)


def make_windows(tokenizer: Any, texts: Sequence[str], *, window: int, overlap: int | None) -> list[Window]:
    """Every note in windows of at most `window` tokens, `overlap` of them shared by neighbours.

    Args:
        tokenizer: one without a fast implementation can only cut (`overlap=None`).
        texts: one or more notes, as they are; an empty one gives a window of special tokens alone.
        window: tokens a window, special tokens included.
        overlap: tokens that neighbours share; None cuts each note to its first window.

    Raises:
        Problem: `overlap` leaves no room to advance, or the tokenizer is a slow one.
    """
    room = window - tokenizer.num_special_tokens_to_add()
    if room < 1:
        raise Problem(f"a window of {window} tokens has no room beside {window - room} special tokens")
    if overlap is not None and not tokenizer.is_fast:
        raise Problem(
            f"{type(tokenizer).__name__} tells no character offsets, which windows need; save the tokenizer with a "
            "tokenizer.json (a fast tokenizer)"
        )
    if overlap is not None and overlap >= room:
        raise Problem(f"an overlap of {overlap} tokens leaves nothing new in a window that holds {room} of the note")
    tokenizer.truncation_side = "right"
    encoded = tokenizer(
        list(texts), truncation=True, max_length=window, padding=False, return_special_tokens_mask=True,
        **({"return_overflowing_tokens": True, "return_offsets_mapping": True, "stride": overlap or 0}
           if tokenizer.is_fast else {}),
    )  # fmt: skip
    owners = encoded.get("overflow_to_sample_mapping") or range(len(texts))
    types = encoded.get("token_type_ids") if "token_type_ids" in tokenizer.model_input_names else None
    windows: list[Window] = []
    for index, owner in enumerate(owners):
        if overlap is None and windows and windows[-1].note == owner:
            continue
        ids = encoded["input_ids"][index]
        goes_on = index + 1 < len(owners) and owners[index + 1] == owner
        windows.append(
            Window(
                note=owner,
                ids=ids,
                types=None if types is None else types[index],
                offsets=encoded["offset_mapping"][index] if tokenizer.is_fast else [(0, 0)] * len(ids),
                special=encoded["special_tokens_mask"][index],
                words=encoded.word_ids(index) if tokenizer.is_fast else [None] * len(ids),
                cut=overlap is None and (goes_on or (len(ids) == window and _longer(tokenizer, texts[owner], window))),
            )
        )
    return windows


def _longer(tokenizer: Any, text: str, window: int) -> bool:
    """For slow tokenizers, which do not tell that they cut."""
    return not tokenizer.is_fast and len(tokenizer(text, truncation=False)["input_ids"]) > window


def plan_batches(lengths: Sequence[int], budget: int, *, padded: bool) -> list[list[int]]:
    """Indices into `lengths` in batches, longest first, so that what memory it takes shows at once.

    Args:
        lengths: in tokens.
        budget: most tokens a batch; one that is longer than that goes alone.
        padded: whether padding is computed too, so that a batch costs its area rather than its real tokens.
    """
    batches: list[list[int]] = []
    spent = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        cost = lengths[batches[-1][0]] if padded and batches else lengths[index]
        if not batches or spent + cost > budget:
            batches.append([])
            spent, cost = 0, lengths[index]
        batches[-1].append(index)
        spent += cost
    return batches


def collate(windows: Sequence[Window], pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and, for models that take them, `token_type_ids`, each int64 [windows, tokens],
    padded at the right."""
    longest = max(map(len, windows))
    batch = {
        "input_ids": torch.tensor([w.ids + [pad_id] * (longest - len(w)) for w in windows]),
        "attention_mask": torch.tensor([[1] * len(w) + [0] * (longest - len(w)) for w in windows]),
    }
    if windows[0].types is not None:
        rows = [(w.types or []) + [0] * (longest - len(w)) for w in windows]
        batch["token_type_ids"] = torch.tensor(rows)
    return batch


def chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
