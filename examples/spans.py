"""From labelled tokens in overlapping windows to spans of characters. Pure Python: no model, no tokenizer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

BEGINS = frozenset("BUS")
ENDS = frozenset("LEUS")
CONTINUES = frozenset("I")


class Token(NamedTuple):
    """A labelled token: characters [start, end) of the note, the number of its word (None: of no word)."""

    start: int
    end: int
    word: int | None
    label: str
    score: float


class Span(NamedTuple):
    """Characters [start, end) of the note; `score` is the mean over its tokens, or words where these were grouped."""

    start: int
    end: int
    label: str
    score: float


def join_windows(windows: Sequence[Sequence[Token]], overlap: int) -> list[Token]:
    """The tokens of a note, each once, from the window where it has more context.

    Context is the number of tokens up to the nearer end of the window; an end that is the note's own cuts nothing off
    and does not count. The earlier window wins a tie.

    Args:
        windows: of one note, in order, without special tokens; each but the first begins with the last `overlap`
            tokens of the one before.
        overlap: in tokens.

    Raises:
        ValueError: neighbours do not hold the same tokens where they overlap.
    """
    best: list[tuple[float, Token]] = []
    begin = 0
    for number, window in enumerate(windows):
        if begin > len(best):
            raise ValueError(f"window {number} begins at token {begin}, but the one before ends at {len(best)}")
        last = number == len(windows) - 1
        for place, token in enumerate(window):
            left = math.inf if number == 0 else place
            right = math.inf if last else len(window) - 1 - place
            context = min(left, right)
            if begin + place == len(best):
                best.append((context, token))
                continue
            seen = best[begin + place]
            if seen[1][:2] != token[:2]:
                raise ValueError(f"window {number} has another token at {token[:2]} than the window before it")
            if context > seen[0]:
                best[begin + place] = context, token
        begin += len(window) - overlap
    return [token for _, token in best]


class Scheme:
    """How a model's labels spell spans: B-, I-, L-, E-, U-, S- before a tag, or bare tags.

    A prefix counts as one only for tags that also have a B- or I- label, so that a bare tag may hold a dash ("S-100").

    Args:
        labels: all labels of the model.
        outside: the label of tokens in no span.

    Raises:
        ValueError: `outside` is none of the labels.
    """

    def __init__(self, labels: Iterable[str], outside: str = "O") -> None:
        names = list(labels)
        if outside not in names:
            shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise ValueError(f"the model has no label {outside!r} for tokens in no span; it has {shown}")
        self.outside = outside
        tags = {name[2:] for name in names if name[:2] in ("B-", "I-")}
        self._parsed: dict[str, tuple[str, str | None]] = {outside: ("", None)}
        for name in names:
            prefixed = name[1:2] == "-" and name[0] in BEGINS | ENDS | CONTINUES and name[2:] in tags
            if name != outside:
                self._parsed[name] = (name[0], name[2:]) if prefixed else ("", name)

    def parse(self, label: str) -> tuple[str, str | None]:
        """Prefix ("" for a bare tag) and tag (None outside)."""
        return self._parsed[label]


def group_words(tokens: Sequence[Token], scheme: Scheme, how: str) -> list[Token]:
    """Tokens of the same word as one token, so that no span ends within a word.

    Args:
        tokens: in the order of the note.
        scheme: of the labels.
        how: `"token"` leaves them as they are; `"first"` gives the word the label of its first token; `"any"` the
            surest label other than outside, where one of its tokens has one.
    """
    if how not in ("token", "first", "any"):
        raise ValueError(f"how={how!r} is unknown; choose 'token', 'first' or 'any'")
    if how == "token":
        return list(tokens)
    words = []
    for word, run in itertools.groupby(tokens, key=lambda token: token.word):
        pieces = list(run)
        if word is None:
            words += pieces
            continue
        flagged = [piece for piece in pieces if piece.label != scheme.outside] if how == "any" else []
        chosen = max(flagged, key=lambda piece: piece.score) if flagged else pieces[0]
        words.append(chosen._replace(start=pieces[0].start, end=max(piece.end for piece in pieces)))
    return words


def find_spans(text: str, tokens: Iterable[Token], scheme: Scheme) -> list[Span]:
    """The spans that `tokens` spell, without white space at their ends.

    A tag without its B- (or L-, E- without a beginning) still makes a span: a missing prefix is a commoner mistake of
    models than a missing name. Characters that several tokens share, as bytes of one do, belong to the first of them.
    """
    spans: list[Span] = []
    run: list[Token] = []
    open_tag: str | None = None

    def close() -> None:
        if run and open_tag is not None:
            start, end = run[0].start, run[-1].end
            piece = text[start:end]
            start += len(piece) - len(piece.lstrip())
            end = start + len(piece.strip())
            if start < end:
                spans.append(Span(start, end, open_tag, math.fsum(token.score for token in run) / len(run)))
        run.clear()

    reached = 0
    for token in tokens:
        if token.end <= max(token.start, reached):
            continue
        token = token._replace(start=max(token.start, reached))
        reached = token.end
        prefix, tag = scheme.parse(token.label)
        if tag != open_tag or prefix in BEGINS:
            close()
            open_tag = tag
        run.append(token)
        if prefix in ENDS:
            close()
            open_tag = None
    close()
    return spans
