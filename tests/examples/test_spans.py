"""Windows joined again, labels to spans: the same as one long window where a label does not depend on its context."""

import itertools
import zlib

import pytest
from batching import make_windows
from example_models import bytelevel, wordpiece
from hypothesis import given, settings
from hypothesis import strategies as st
from spans import Scheme, Span, Token, find_spans, group_words, join_windows

LABELS = ["O", "B-NAME", "I-NAME", "B-AGE", "I-AGE"]
SCHEME = Scheme(LABELS)
TOKENIZERS = {"wordpiece": wordpiece(), "bytelevel": bytelevel()}
PIECES = [*"aAzZ09 .,-()áÑß中😀\n\t\u00a0\ufeff", "\r\n", "e\u0301", "garcía"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


def label_of(text, token):
    """A labeller that sees nothing but the token and its place."""
    return LABELS[zlib.crc32(f"{text[token[0] : token[1]]}{token[0] % 3}".encode()) % len(LABELS)]


def windows_of(text, tokenizer, window, overlap):
    """Labelled tokens, as a model without context would give them."""
    return [
        [
            Token(*piece.offsets[i], piece.words[i], label_of(text, piece.offsets[i]), 0.5 + (piece.ids[i] % 7) / 20)
            for i in range(len(piece))
            if not piece.special[i]
        ]
        for piece in make_windows(tokenizer, [text], window=window, overlap=overlap)
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS, window=st.integers(4, 24), share=st.floats(0, 0.999), how=st.sampled_from(["token", "first", "any"]))
@settings(max_examples=150, deadline=None)
def test_a_note_in_windows_gives_the_spans_of_the_note_in_one(name, text, window, share, how):
    overlap = int(share * (window - 2))
    whole = windows_of(text, TOKENIZERS[name], 100_000, 0)
    pieces = windows_of(text, TOKENIZERS[name], window, overlap)
    assert len(whole) == 1 and all(len(piece) <= window - 2 for piece in pieces)
    tokens = join_windows(pieces, overlap)
    assert tokens == whole[0]
    spans = find_spans(text, group_words(tokens, SCHEME, how), SCHEME)
    assert spans == find_spans(text, group_words(whole[0], SCHEME, how), SCHEME)
    for span in spans:
        piece = text[span.start : span.end]
        assert piece and piece == piece.strip() and span.label in ("NAME", "AGE") and 0.5 <= span.score < 1
    assert all(a.end <= b.start for a, b in itertools.pairwise(spans))


@given(count=st.integers(1, 60), room=st.integers(1, 12), share=st.floats(0, 0.999))
def test_each_token_takes_the_window_with_more_context(count, room, share):
    """Against the plain definition, tried over all windows."""
    overlap = int(share * room)
    begins, begin = [0], 0
    while begin + room < count:
        begin += room - overlap
        begins.append(begin)
    windows = [
        [Token(i, i + 1, i, "O", float(number)) for i in range(begin, min(begin + room, count))]
        for number, begin in enumerate(begins)
    ]

    def context(position, number):
        left = position - begins[number] if begins[number] > 0 else 10**9
        right = begins[number] + room - 1 - position if begins[number] + room < count else 10**9
        return min(left, right)

    joined = join_windows(windows, overlap)
    assert [token.start for token in joined] == list(range(count))
    for position, token in enumerate(joined):
        holding = [n for n, begin in enumerate(begins) if begin <= position < begin + room]
        assert token.score == max(holding, key=lambda n: (context(position, n), -n))


def test_windows_that_do_not_fit_are_told():
    a, b, c = (Token(i, i + 1, i, "O", 1.0) for i in range(3))
    with pytest.raises(ValueError, match=r"another token at \(2, 3\)"):
        join_windows([[a, b], [c]], 1)
    assert join_windows([], 0) == [] and join_windows([[]], 3) == []


def tokens_of(labels, text="aa bb cc dd ee ff gg hh"):
    return [Token(3 * i, 3 * i + 2, i, label, (i + 1) / 10) for i, label in enumerate(labels.split())], text


@pytest.mark.parametrize(
    "labels, expected",
    [
        ("O B-X I-X O", [(3, 8, "X", 0.25)]),
        ("B-X B-X I-X", [(0, 2, "X", 0.1), (3, 8, "X", 0.25)]),
        ("I-X I-X O I-X", [(0, 5, "X", 0.15), (9, 11, "X", 0.4)]),
        ("B-X I-Y I-Y", [(0, 2, "X", 0.1), (3, 8, "Y", 0.25)]),
        ("X X O Y", [(0, 5, "X", 0.15), (9, 11, "Y", 0.4)]),
        ("B-X I-X L-X U-X I-X", [(0, 8, "X", 0.2), (9, 11, "X", 0.4), (12, 14, "X", 0.5)]),
        ("S-X S-X B-X E-X", [(0, 2, "X", 0.1), (3, 5, "X", 0.2), (6, 11, "X", 0.35)]),
        ("O O", []),
        ("", []),
    ],
)
def test_tag_schemes(labels, expected):
    tokens, text = tokens_of(labels)
    found = find_spans(text, tokens, Scheme({*labels.split(), "O", *(f"B-{t}" for t in "XY" if "-" in labels)}))
    assert [span[:3] for span in found] == [span[:3] for span in expected]
    assert [span.score for span in found] == pytest.approx([span[3] for span in expected])


def test_labels_that_only_look_like_prefixes():
    scheme = Scheme(["LABEL_0", "LABEL_1", "S-100", "B-DRUG"], outside="LABEL_0")
    assert scheme.parse("LABEL_0") == ("", None)
    assert scheme.parse("LABEL_1") == ("", "LABEL_1")
    assert scheme.parse("S-100") == ("", "S-100")
    assert scheme.parse("B-DRUG") == ("B", "DRUG")


def test_an_outside_label_that_the_model_lacks():
    with pytest.raises(ValueError, match="no label 'O' for tokens in no span; it has LABEL_0, LABEL_1"):
        Scheme(["LABEL_0", "LABEL_1"])


WORD = [Token(0, 3, 0, "O", 0.9), Token(3, 5, 0, "I-NAME", 0.6), Token(5, 7, 0, "B-AGE", 0.5), Token(8, 9, 1, "O", 0.8)]


@pytest.mark.parametrize(
    "how, expected",
    [
        ("token", [Span(3, 5, "NAME", 0.6), Span(5, 7, "AGE", 0.5)]),
        ("first", []),
        ("any", [Span(0, 7, "NAME", 0.6)]),
    ],
)
def test_words(how, expected):
    assert find_spans("Muñozin x", group_words(WORD, SCHEME, how), SCHEME) == expected


def test_an_unknown_way_to_group():
    with pytest.raises(ValueError, match="how='mean' is unknown"):
        group_words(WORD, SCHEME, "mean")


def test_characters_that_tokens_share():
    tokens = [Token(0, 1, 0, "B-NAME", 1.0), Token(0, 1, 0, "B-AGE", 0.2), Token(0, 3, 0, "I-NAME", 0.5)]
    assert find_spans("ñáb", tokens, SCHEME) == [Span(0, 3, "NAME", 0.75)]


def test_white_space_is_no_part_of_a_span():
    tokens = [Token(0, 4, 0, "B-NAME", 1.0), Token(4, 6, None, "I-NAME", 1.0), Token(6, 6, None, "B-AGE", 1.0)]
    assert find_spans(" Ana\r\n", tokens, SCHEME) == [Span(1, 4, "NAME", 1.0)]
    assert find_spans("  \r\n  ", tokens, SCHEME) == []
