"""The NER example as its users run it, on a small random model: against stock and against transformers' pipeline."""

import itertools

import batching
import common
import ner_folder
import pytest
import torch
from batching import plan_batches
from example_models import LABELS, NOTES, bytelevel, model_folder, wordpiece, write_notes
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForTokenClassification, AutoTokenizer, ByT5Tokenizer, pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"), "token", LABELS)


@pytest.fixture
def notes(tmp_path):
    return write_notes(tmp_path / "notes")


@pytest.fixture
def go(model, notes, tmp_path):
    """Runs the example; returns its exit status."""

    def run(*arguments, out=tmp_path / "spans.jsonl", folder=notes, model=model):
        given = ["--model", str(model), "--notes", str(folder), "--out", str(out), *map(str, arguments)]
        return ner_folder.main(given)

    return run


def by_file(path, read_lines):
    return {record["file"]: record["spans"] for record in read_lines(path)}


def test_offsets_hold_in_the_files_as_they_are(go, notes, tmp_path, read_lines, capsys):
    assert go("--token-budget", 200) == 0
    records = read_lines(tmp_path / "spans.jsonl")
    assert [record["file"] for record in records] == sorted(NOTES)
    for record in records:
        with open(notes / record["file"], encoding=record["encoding"], newline="") as file:
            text = file.read()
        assert text == NOTES[record["file"]]
        for span in record["spans"]:
            assert span["text"] == text[span["start"] : span["end"]].strip() != ""
            assert span["label"] in ("NAME", "AGE") and 0 < span["score"] <= 1
    assert len(by_file(tmp_path / "spans.jsonl", read_lines)["long.txt"]) > 5
    told = capsys.readouterr().err
    assert "6 notes, " in told and " 0 stock calls" in told and " 0 fast calls" not in told


@pytest.mark.parametrize("aggregate", ["token", "first", "any"])
def test_the_same_spans_as_stock(go, tmp_path, read_lines, monkeypatch, aggregate):
    """Long notes in windows, batches of several notes; stock pads them and agrees."""
    arguments = ("--aggregate", aggregate, "--window", 24, "--stride", 9, "--token-budget", 100)
    assert go(*arguments) == 0
    fast = read_lines(tmp_path / "spans.jsonl")
    monkeypatch.setattr(common, "make_fast", lambda model, **options: False)
    monkeypatch.setattr(common, "summary", lambda model: "")
    assert go(*arguments, out=tmp_path / "stock.jsonl") == 0
    stock = read_lines(tmp_path / "stock.jsonl")
    assert sum(len(record["spans"]) for record in stock) > 20
    for a, b in zip(fast, stock, strict=True):
        scores = [[span.pop("score") for span in record["spans"]] for record in (a, b)]
        assert a == b and scores[0] == pytest.approx(scores[1], abs=2e-5)


def test_the_same_spans_as_the_pipeline_of_transformers(go, model, tmp_path, read_lines):
    assert go("--aggregate", "token") == 0
    run = pipeline(
        "token-classification", model=AutoModelForTokenClassification.from_pretrained(model),
        tokenizer=AutoTokenizer.from_pretrained(model), aggregation_strategy="simple",
    )  # fmt: skip
    found = by_file(tmp_path / "spans.jsonl", read_lines)
    short = [file for file in NOTES if file != "long.txt"]
    assert sum(len(found[file]) for file in short) > 10
    for file in short:
        expected = run(NOTES[file])
        assert [(s["start"], s["end"], s["label"]) for s in found[file]] == [
            (s["start"], s["end"], s["entity_group"]) for s in expected
        ]
        assert [s["score"] for s in found[file]] == pytest.approx([s["score"] for s in expected], abs=2e-5)


def test_windows_of_all_notes_share_batches(go, monkeypatch):
    sizes = []
    plain = batching.collate

    def collate(windows, pad_id):
        sizes.append([len(window) for window in windows])
        return plain(windows, pad_id)

    monkeypatch.setattr(ner_folder, "collate", collate)
    assert go("--window", 24, "--stride", 6, "--token-budget", 200) == 0
    assert len(sizes) > 2 and max(map(len, sizes)) > 4
    assert all(sum(lengths) <= 200 for lengths in sizes)
    flat = [length for lengths in sizes for length in lengths]
    assert flat == sorted(flat, reverse=True)


def test_bad_files_are_told_and_skipped(go, notes, tmp_path, read_lines, capsys):
    (notes / "latin.txt").write_bytes("Señora Núñez".encode("latin-1"))
    (notes / "binary.txt").write_bytes(b"PK\0\0")
    (notes / "large.txt").write_bytes(b"x" * 5001)
    (notes / "blank.txt").write_bytes(b"")
    (notes / "spaces.txt").write_bytes(b" \r\n\t")
    assert go("--max-bytes", 5000) == 1
    found = by_file(tmp_path / "spans.jsonl", read_lines)
    assert set(found) == {*NOTES, "blank.txt", "spaces.txt"} and found["blank.txt"] == found["spaces.txt"] == []
    told = " ".join(capsys.readouterr().err.split())
    assert "skipped latin.txt: is not utf-8 (byte 0xf1 at 2); notes from Windows may want" in told
    assert "skipped binary.txt: holds NUL characters" in told and "skipped large.txt: 5,001 bytes" in told

    assert go("--max-bytes", 5000, "--encoding", "utf-8", "cp1252", "--overwrite") == 1
    latin = next(r for r in read_lines(tmp_path / "spans.jsonl") if r["file"] == "latin.txt")
    assert latin["encoding"] == "cp1252"


def test_a_stopped_run_goes_on(go, notes, tmp_path, read_lines, monkeypatch):
    out = tmp_path / "spans.jsonl"
    assert go("--chunk", 2) == 0
    expected = out.read_bytes()
    out.unlink()

    plain, tagged = ner_folder.Tagger.tag, []

    def tag(self, chunk, stop_at=None):
        tagged.extend(note.file for note in chunk)
        if len(tagged) == stop_at:
            raise KeyboardInterrupt
        return plain(self, chunk)

    monkeypatch.setattr(ner_folder.Tagger, "tag", lambda self, chunk: tag(self, chunk, stop_at=4))
    with pytest.raises(KeyboardInterrupt):
        go("--chunk", 2)
    assert not out.exists()
    with open(tmp_path / "spans.jsonl.partial", "ab") as file:
        file.write(b'{"file": "ge')
    first = tagged[:2]
    tagged.clear()
    monkeypatch.setattr(ner_folder.Tagger, "tag", tag)
    assert go("--chunk", 2) == 0
    assert tagged == [file for file in sorted(NOTES) if file not in first]
    assert out.read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "spans.jsonl", "spans.jsonl.run.json"]

    tagged.clear()
    (notes / "tiny.txt").write_bytes(b"not ok")
    (notes / "new.txt").write_bytes(b"new")
    (notes / "plain.txt").unlink()
    assert go("--chunk", 2) == 0
    assert tagged == ["new.txt", "tiny.txt"]
    assert set(by_file(out, read_lines)) == {*NOTES, "new.txt"} - {"plain.txt"}


def test_results_of_two_models_are_never_mixed(go, model, tmp_path):
    assert go() == 0
    other = model_folder(tmp_path / "other", "token", LABELS, seed=1)
    with pytest.raises(common.Problem, match="another model; give another --out, or --overwrite"):
        go(model=other)
    with pytest.raises(common.Problem, match="another window, stride"):
        go("--window", 32)
    assert go("--overwrite", model=other) == 0


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--model", "nowhere"], "the model folder nowhere does not exist"),
        (["--notes", "nowhere"], "the folder of notes nowhere does not exist"),
        (["--window", "65"], "--window 65 is more than the 64 tokens"),
        (["--window", "2"], "a window of 2 tokens has no room"),
        (["--window", "20", "--stride", "18"], "an overlap of 18 tokens leaves nothing new"),
        (["--stride", "-1"], "--stride -1 is negative"),
        (["--outside", "NONE"], "--outside: the model has no label 'NONE'"),
        (["--encoding", "utf-9"], "--encoding utf-9 is not known"),
        (["--out", "nowhere/spans.jsonl"], "the folder nowhere does not exist"),
    ],
)
def test_mistakes_are_told_in_a_sentence(go, arguments, sentence):
    with pytest.raises(common.Problem, match=sentence):
        go(*arguments)


def test_label_names_without_a_meaning(go, tmp_path, read_lines):
    folder = model_folder(tmp_path / "numbers", "token", ["LABEL_0", "LABEL_1", "LABEL_2"])
    with pytest.raises(common.Problem, match="no label 'O' for tokens in no span; it has LABEL_0"):
        go(model=folder)
    assert go("--outside", "LABEL_0", model=folder) == 0
    labels = {span["label"] for record in read_lines(tmp_path / "spans.jsonl") for span in record["spans"]}
    assert labels == {"LABEL_1", "LABEL_2"}


def test_models_that_cannot_serve(go, model, tmp_path):
    with pytest.raises(common.Problem, match=r"was not trained for this: it has no classifier\.bias"):
        go(model=model_folder(tmp_path / "base", "base"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises(common.Problem, match=r"in .*broken cannot be loaded"):
        go(model=tmp_path / "broken")


def test_a_model_that_clinfast_does_not_know_runs_stock_and_says_so(go, tmp_path, capsys, read_lines):
    from transformers import FunnelConfig, FunnelForTokenClassification

    torch.manual_seed(0)
    tokenizer = wordpiece()
    config = FunnelConfig(
        vocab_size=len(tokenizer), d_model=32, n_head=2, d_head=16, d_inner=32, block_sizes=[1, 1],
        num_decoder_layers=1, id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    FunnelForTokenClassification(config).save_pretrained(tmp_path / "funnel")
    tokenizer.save_pretrained(tmp_path / "funnel")
    assert go(model=tmp_path / "funnel") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "runs without clinfast: there is nothing to optimize" in told
    assert "clinfast: nothing here is optimized" in told
    assert len(read_lines(tmp_path / "spans.jsonl")) == len(NOTES)
    with pytest.raises(common.Problem, match="there is nothing to optimize"):
        go("--strict", "--overwrite", model=tmp_path / "funnel")


def test_a_tokenizer_without_offsets_is_refused(go, tmp_path):
    folder = model_folder(tmp_path / "slow", "token", LABELS, tokenizer=ByT5Tokenizer(model_max_length=64))
    with pytest.raises(common.Problem, match="ByT5Tokenizer tells no character offsets"):
        go(model=folder)


@pytest.mark.parametrize("aggregate", ["token", "first"])
def test_special_tokens_in_the_text_of_a_note(go, notes, tmp_path, read_lines, aggregate):
    text = "Pt [SEP] seen [CLS][PAD] by [MASK] Dr. [UNK] García. " * 5
    (notes / "special.txt").write_text(text, encoding="utf-8")
    found = []
    for window in (20, 64):
        out = tmp_path / f"{window}.jsonl"
        assert go("--window", window, "--aggregate", aggregate, out=out) == 0
        found.append(by_file(out, read_lines)["special.txt"])
        assert found[-1] and all(span["text"] == text[span["start"] : span["end"]] for span in found[-1])


def test_positions_counted_from_the_padding_id():
    from transformers import RobertaConfig, RobertaModel

    size = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    roberta = RobertaModel(RobertaConfig(vocab_size=300, max_position_embeddings=34, pad_token_id=1, **size)).eval()
    limit = common.token_limit(roberta, bytelevel())
    assert limit == 32
    roberta(torch.full((1, limit), 7))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, limit + 1), 7))


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 100), st.booleans())
def test_batches_under_a_budget(lengths, budget, padded):
    batches = plan_batches(lengths, budget, padded=padded)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))

    def cost(batch):
        return len(batch) * max(lengths[i] for i in batch) if padded else sum(lengths[i] for i in batch)

    assert all(cost(batch) <= budget or len(batch) == 1 for batch in batches)
    for first, second in itertools.pairwise(batches):
        assert cost([*first, second[0]]) > budget


def test_a_folder_name_that_is_not_utf8(go, notes, tmp_path, read_lines):
    (notes / b"se\xf1or".decode("utf-8", "surrogateescape")).with_suffix(".txt").write_bytes(b"ok")
    assert go() == 0
    assert "se\udcf1or.txt" in by_file(tmp_path / "spans.jsonl", read_lines)


def test_the_fast_path_can_be_switched_off_in_production(go, monkeypatch, capsys):
    monkeypatch.setenv("CLINFAST_DISABLE", "1")
    assert go() == 0
    assert " 0 fast calls" in capsys.readouterr().err
