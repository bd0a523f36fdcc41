"""Labels or embeddings for a file of notes (JSONL or CSV), with any model folder, on CPU and offline:

    python examples/batch_job.py labels --model ./triage-model --notes notes.jsonl --out labels.jsonl
    python examples/batch_job.py embeddings --model ./all-MiniLM-L6-v2 --notes notes.csv --out embeddings.npy

One line (or row of the .npy) for each note, in the order of the notes: `{"row", "id", "labels": [{"label", "score"}]}`
or `{"row", "id", "embedding": [...]}`. Notes longer than the model's window are read in several windows, and the
answers averaged by their tokens; with `--long cut` only the first is read, and the line says `"cut": true`. An empty or
unreadable note gets a line with `"error"` (NaN in a .npy), so that lines and notes always match.

Work is saved in chunks: a run that was stopped goes on where it was when the same command is given again. Exit status:
0; 1 where notes were unreadable; 2 where nothing could be done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from batching import chunks, collate, make_windows, plan_batches
from common import Problem
from journal import Journal, Record
from note_files import Row, file_digest, read_rows
from torch import Tensor

MANY_LABELS = 0.5


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head.rstrip(":"), epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("labels", "embeddings"), help="what to compute")
    common.add_model_arguments(parser)
    notes = parser.add_argument_group("notes")
    notes.add_argument("--notes", type=Path, required=True, metavar="FILE", help=".jsonl or .csv (by its ending)")
    notes.add_argument("--text", default="text", metavar="FIELD", help="field or column with the note (%(default)s)")
    notes.add_argument("--id", default="id", metavar="FIELD", help="field to copy to the results (%(default)s)")
    notes.add_argument("--encoding", default="utf-8", metavar="NAME", help="such as cp1252 (%(default)s)")
    notes.add_argument("--out", type=Path, required=True, metavar="FILE", help=".jsonl, or .npy for embeddings")
    notes.add_argument("--overwrite", action="store_true", help="begin anew, whatever --out holds")
    notes.add_argument(
        "--chunk", type=common.positive, default=2048, metavar="N", help="notes sorted and saved together (%(default)s)"
    )
    notes.add_argument("--long", choices=("windows", "cut"), default="windows", help="too long notes (windows)")
    notes.add_argument("--window", type=common.positive, metavar="N", help="tokens a window (what the model reads)")
    notes.add_argument("--top", type=common.positive, default=1, metavar="N", help="labels a note (%(default)s)")
    return parser.parse_args(arguments)


class Classifier:
    """Probabilities of the labels, [notes, labels]."""

    def __init__(self, folder: Path, top: int) -> None:
        self.tokenizer = common.load_tokenizer(folder)
        self.model = common.load_model(folder, "AutoModelForSequenceClassification")
        self.limit = common.token_limit(self.model, self.tokenizer)
        config = self.model.config
        self.kind = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
        self.top = top

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(**batch).logits.float()
        if self.kind == "regression":
            return logits
        return logits.sigmoid() if self.kind == "multi_label_classification" else logits.softmax(-1)

    def answer(self, windows: Tensor, weights: Tensor) -> Record:
        scores = (windows * weights[:, None]).sum(0) / weights.sum()
        names = self.model.config.id2label
        order = scores.argsort(descending=True, stable=True).tolist()
        if self.kind == "multi_label_classification":
            order = [label for label in order if scores[label] >= MANY_LABELS]
        elif self.kind != "regression":
            order = order[: self.top]
        return {"labels": [{"label": names[label], "score": round(scores[label].item(), 6)} for label in order]}


class Embedder:
    """Embeddings, [notes, hidden]: by the pooling of a sentence-transformers folder, else the mean over tokens."""

    def __init__(self, folder: Path) -> None:
        self.own = (folder / "modules.json").is_file()
        if self.own:
            self.model: Any = common.load_sentence_transformer(folder)
            self.tokenizer = self.model.tokenizer
            self.limit = self.model.max_seq_length or common.token_limit(self.model, self.tokenizer)
        else:
            self.tokenizer = common.load_tokenizer(folder)
            self.model = common.load_model(folder, "AutoModel")
            self.limit = common.token_limit(self.model, self.tokenizer)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        if self.own:
            return self.model(dict(batch))["sentence_embedding"].float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        return (self.model(**batch).last_hidden_state.float() * mask).sum(1) / mask.sum(1)

    def answer(self, windows: Tensor, weights: Tensor) -> Record:
        mean = (windows * weights[:, None]).sum(0) / weights.sum() if len(windows) > 1 else windows[0]
        if len(windows) > 1 and torch.allclose(windows.norm(dim=1), torch.ones(len(windows)), atol=1e-3):
            mean = mean / mean.norm()
        return {"embedding": [float(f"{x:.9g}") for x in mean.tolist()]}  # nine digits hold a float32


def compute(
    work: Classifier | Embedder, texts: Sequence[str], *, window: int, long: str, budget: int, padded: bool
) -> Iterator[tuple[float, list[Record] | None]]:
    """Yields the share of the work done, and at last the answer for each text."""
    if not texts:
        yield 1.0, []
        return
    overlap = 0 if long == "windows" and work.tokenizer.is_fast else None
    windows = make_windows(work.tokenizer, texts, window=window, overlap=overlap)
    lengths = [len(window) for window in windows]
    outputs: list[Tensor] = [torch.empty(0)] * len(windows)
    done = 0
    for batch in plan_batches(lengths, budget, padded=padded):
        with torch.inference_mode():
            rows = work(collate([windows[i] for i in batch], work.tokenizer.pad_token_id))
        for index, row in zip(batch, rows, strict=True):
            outputs[index] = row
        done += sum(lengths[i] for i in batch)
        yield done / sum(lengths), None
    pieces: list[list[int]] = [[] for _ in texts]
    for index, piece in enumerate(windows):
        pieces[piece.note].append(index)
    answers = []
    for own in pieces:
        weights = torch.tensor([float(lengths[i]) for i in own])
        answer = work.answer(torch.stack([outputs[i] for i in own]), weights)
        answers.append(answer | ({"cut": True} if windows[own[0]].cut else {}))
    yield 1.0, answers


def write_npy(path: Path, records: Iterable[Record], shape: tuple[int, int]) -> None:
    """float32 [notes, hidden]; NaN where a note gave none."""
    matrix = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for row, record in enumerate(records):
        matrix[row] = record.get("embedding", np.nan)
    matrix.flush()


def records_of(rows: Sequence[tuple[int, Row]], answers: Sequence[Record]) -> Iterator[Record]:
    """The answers of the good rows, the errors of the others."""
    good = iter(answers)
    for number, row in rows:
        yield {"row": number, "id": row.id} | ({"error": row.error} if row.error is not None else next(good))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    options = options_of(arguments)
    console = common.console()
    as_matrix = options.out.suffix.lower() == ".npy"
    if as_matrix and options.task == "labels":
        raise Problem(f"--out {options.out}: a .npy holds embeddings; labels go to a .jsonl")

    def read() -> Iterator[tuple[int, Row]]:
        return enumerate(read_rows(options.notes, options.text, options.id, options.encoding))

    total = sum(1 for _ in read())
    if not total:
        raise Problem(f"there is no note in {options.notes}")
    work = Classifier(options.model, options.top) if options.task == "labels" else Embedder(options.model)
    window = options.window or min(work.limit, common.UNKNOWN_LIMIT)
    if window > work.limit:
        raise Problem(f"--window {window} is more than the {work.limit} tokens that the model reads")
    if options.long == "windows" and not work.tokenizer.is_fast:
        console.print("the tokenizer is a slow one, which makes no windows: notes that are too long are cut")
    fast = common.make_fast(
        work.model, precision=options.precision, strict=options.strict, threads=options.threads
    )
    settings = {
        "task": options.task, "model": common.folder_digest(options.model), "notes": file_digest(options.notes),
        "text": options.text, "id": options.id, "encoding": options.encoding, "precision": options.precision,
        "window": window, "long": options.long, "top": options.top,
    }  # fmt: skip
    with Journal(options.out, settings, lambda record: record["row"], overwrite=options.overwrite) as journal:
        if journal.complete:
            console.print(f"{options.out} is complete already; --overwrite computes it again", soft_wrap=True)
            return 0
        with common.progress(console, "notes") as bar:
            task = bar.add_task("", total=total, completed=len(journal))
            for rows in chunks((pair for pair in read() if pair[0] not in journal), options.chunk):
                texts = [row.text for _, row in rows if row.error is None]
                before = bar.tasks[task].completed
                for share, answers in compute(
                    work, texts, window=window, long=options.long, budget=options.token_budget, padded=not fast
                ):
                    bar.update(task, completed=before + share * len(rows))
                    if answers is not None:
                        journal.append(records_of(rows, answers))
        errors = [(record["row"], record["error"]) for record in journal.records(range(total)) if "error" in record]
        if as_matrix:
            widths = (len(record["embedding"]) for record in journal.records(range(total)) if "embedding" in record)
            shape = total, next(widths, 0)
            journal.finish(range(total), lambda path, records: write_npy(path, records, shape))
        else:
            journal.finish(range(total))
    console.print(f"{total:,} notes, in {options.out}", soft_wrap=True)
    for row, error in errors:
        console.print(f"note {row + 1} {error}", markup=False, soft_wrap=True, style="red")
    console.print(common.summary(work.model), markup=False, soft_wrap=True)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(common.run(main))
