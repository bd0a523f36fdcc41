"""Entities in a folder of notes (.txt, in any depth), with any token-classification model, on CPU and offline:

    python examples/ner_folder.py --model ./deid-model --notes ./notes --out spans.jsonl

A line of `spans.jsonl` is a note: `{"file", "sha256", "encoding", "spans": [{"start", "end", "label", "score",
"text"}]}`. Offsets count characters of the file as it is, both characters of a Windows line end included: read it with
`open(file, encoding=encoding, newline="")`. Notes longer than the model's window are read in overlapping windows.

A run that was stopped goes on where it was when the same command is given again; a finished one takes new and changed
notes up. Exit status: 0; 1 where notes were skipped (each is told, with the reason); 2 where nothing could be done.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import common
import torch
from batching import Window, chunks, collate, make_windows, plan_batches
from common import Problem
from journal import Journal, Record
from spans import Scheme, Span, Token, find_spans, group_words, join_windows


class Note(NamedTuple):
    file: str
    sha256: str
    encoding: str
    text: str


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head.rstrip(":"), epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_model_arguments(parser)
    notes = parser.add_argument_group("notes")
    notes.add_argument("--notes", type=Path, required=True, metavar="FOLDER", help="folder of .txt files")
    notes.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines to write")
    notes.add_argument("--overwrite", action="store_true", help="begin anew, whatever --out holds")
    notes.add_argument(
        "--encoding", nargs="+", default=["utf-8"], metavar="NAME",
        help="tried in this order on each file, as in: utf-8 cp1252 (utf-8 alone)",
    )  # fmt: skip
    notes.add_argument(
        "--max-bytes", type=common.positive, default=10_000_000, metavar="N", help="skip larger files (%(default)s)"
    )
    notes.add_argument(
        "--chunk", type=common.positive, default=1024, metavar="N", help="notes read, sorted and saved together (1024)"
    )
    labels = parser.add_argument_group("windows and spans")
    labels.add_argument("--window", type=common.positive, metavar="N", help="tokens a window (what the model reads)")
    labels.add_argument("--stride", type=int, metavar="N", help="tokens that neighbours share (a quarter of a window)")
    labels.add_argument("--outside", default="O", metavar="LABEL", help="the label of tokens in no span (O)")
    labels.add_argument(
        "--aggregate", choices=("token", "first", "any"), default="first",
        help="a word takes the label of its first token, or of any token that has one (finds more: for "
        "de-identification); token: spans may end within a word (%(default)s)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def find_notes(folder: Path) -> list[str]:
    """Paths of the .txt files under `folder`, relative to it, in order."""
    if not folder.is_dir():
        raise Problem(f"the folder of notes {folder} does not exist")
    paths = [path for path in folder.rglob("*") if path.suffix.lower() == ".txt" and path.is_file()]
    if not paths:
        raise Problem(f"there is no .txt file in {folder}")
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def read_note(folder: Path, file: str, encodings: Sequence[str], max_bytes: int) -> Note:
    """The note to the character: no line end is changed. Raises `Problem` with the reason not to take it."""
    path = folder / file
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise Problem(f"{size:,} bytes, more than --max-bytes {max_bytes:,}")
        data = path.read_bytes()
    except OSError as problem:
        raise Problem(f"cannot be read: {problem.strerror}") from problem
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as problem:
            where = problem.start
            continue
        if "\0" in text:
            raise Problem(f"holds NUL characters: not text in {encoding}")
        return Note(file, hashlib.sha256(data).hexdigest(), encoding, text)
    hint = "" if len(encodings) > 1 else "; notes from Windows may want --encoding utf-8 cp1252"
    raise Problem(f"is not {' or '.join(encodings)} (byte 0x{data[where]:02x} at {where}){hint}")


class Tagger:
    """Notes to spans: windows of all notes, batched by length, and joined again."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tokenizer = common.load_tokenizer(options.model)
        self.model = common.load_model(options.model, "AutoModelForTokenClassification")
        self.labels: list[str] = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        try:
            self.scheme = Scheme(self.labels, options.outside)
        except ValueError as problem:
            raise Problem(f"--outside: {problem}") from problem
        limit = common.token_limit(self.model, self.tokenizer)
        self.window = options.window or limit
        if self.window > limit:
            raise Problem(f"--window {self.window} is more than the {limit} tokens that the model reads")
        self.overlap = self.window // 4 if options.stride is None else options.stride
        if self.overlap < 0:
            raise Problem(f"--stride {self.overlap} is negative")
        make_windows(self.tokenizer, [""], window=self.window, overlap=self.overlap)  # tells what is wrong with them
        self.aggregate, self.budget = options.aggregate, options.token_budget
        self.fast = common.make_fast(
            self.model, precision=options.precision, strict=options.strict, threads=options.threads
        )

    def tag(self, notes: Sequence[Note]) -> Iterator[tuple[float, list[list[Span]] | None]]:
        """Yields the share of the work done, and at last the spans of each note."""
        texts = [note.text for note in notes]
        windows = make_windows(self.tokenizer, texts, window=self.window, overlap=self.overlap)
        lengths = [len(window) for window in windows]
        labelled: list[list[Token]] = [[] for _ in windows]
        done = 0
        for batch in plan_batches(lengths, self.budget, padded=not self.fast):
            for index, tokens in zip(batch, self._label([windows[i] for i in batch]), strict=True):
                labelled[index] = tokens
            done += sum(lengths[i] for i in batch)
            yield done / sum(lengths), None
        by_note: list[list[list[Token]]] = [[] for _ in notes]
        for window, tokens in zip(windows, labelled, strict=True):
            by_note[window.note].append(tokens)
        yield 1.0, [self._join(text, pieces) for text, pieces in zip(texts, by_note, strict=True)]

    def _label(self, windows: Sequence[Window]) -> Iterator[list[Token]]:
        with torch.inference_mode():
            logits = self.model(**collate(windows, self.tokenizer.pad_token_id)).logits
            scores, ids = logits.float().softmax(-1).max(-1)
        for window, row_scores, row_ids in zip(windows, scores.tolist(), ids.tolist(), strict=True):
            yield [
                Token(*window.offsets[i], window.words[i], self.labels[row_ids[i]], row_scores[i])
                for i in range(len(window))
                if not window.special[i]
            ]

    def _join(self, text: str, pieces: list[list[Token]]) -> list[Span]:
        tokens = group_words(join_windows(pieces, self.overlap), self.scheme, self.aggregate)
        return find_spans(text, tokens, self.scheme)


def record_of(note: Note, spans: Sequence[Span]) -> Record:
    told = [
        {**span._asdict(), "score": round(span.score, 6), "text": note.text[span.start : span.end]} for span in spans
    ]
    return {"file": note.file, "sha256": note.sha256, "encoding": note.encoding, "spans": told}


def key_of(record: Record) -> tuple[str, str]:
    # With the content: a note that was changed is a new note.
    return record["file"], record["sha256"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    options = options_of(arguments)
    console = common.console()
    for name in options.encoding:
        try:
            codecs.lookup(name)
        except LookupError:
            raise Problem(f"--encoding {name} is not known to Python") from None
    files = find_notes(options.notes)
    tagger = Tagger(options)
    settings = {
        "model": common.folder_digest(options.model), "window": tagger.window, "stride": tagger.overlap,
        "outside": options.outside, "aggregate": options.aggregate, "precision": options.precision,
        "encoding": options.encoding,
    }  # fmt: skip
    keys: list[tuple[str, str]] = []
    skipped: list[str] = []
    with Journal(options.out, settings, key_of, overwrite=options.overwrite, seed=True) as journal:
        with common.progress(console, "notes") as bar:
            task = bar.add_task("", total=len(files))

            def unfinished() -> Iterator[Note]:
                for file in files:
                    try:
                        note = read_note(options.notes, file, options.encoding, options.max_bytes)
                    except Problem as problem:
                        skipped.append(f"{file}: {problem}")
                        bar.update(task, advance=1)
                        continue
                    keys.append((note.file, note.sha256))
                    if keys[-1] in journal:
                        bar.update(task, advance=1)
                    else:
                        yield note

            for notes in chunks(unfinished(), options.chunk):
                before = bar.tasks[task].completed
                for share, spans in tagger.tag(notes):
                    bar.update(task, completed=before + share * len(notes))
                    if spans is not None:
                        journal.append(record_of(note, found) for note, found in zip(notes, spans, strict=True))
        counts = collections.Counter(span["label"] for record in journal.records(keys) for span in record["spans"])
        journal.finish(keys)
    told = ", ".join(f"{label} {count:,}" for label, count in counts.most_common())
    found = f"{counts.total():,} spans ({told})" if told else "no spans"
    console.print(f"{len(keys):,} notes, {found}, in {options.out}", soft_wrap=True)
    for line in skipped:
        console.print(f"skipped {line}", markup=False, soft_wrap=True, style="red")
    console.print(common.summary(tagger.model), markup=False, soft_wrap=True)
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(common.run(main))
