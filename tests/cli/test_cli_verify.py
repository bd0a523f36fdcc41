"""`clinfast verify` through its entry function: what passes, what fails, and what it says of bad input."""

import json
import shutil

import pytest
import tiny
import torch
from bert_models import mapped
from safetensors.torch import load_file, save_file

import clinfast
from clinfast.engine.encoder import Encoder
from clinfast_command import main

pytestmark = pytest.mark.usefixtures("one_thread")


def verify(folder, notes, *options):
    return main(["verify", str(folder), "--texts", str(notes), *map(str, options)])


@pytest.mark.parametrize("head", ["base", "sequence", "token", "qa", "mlm"])
def test_passes_on_a_good_model(head, tmp_path, notes, capsys):
    folder, file = tiny.save(tmp_path / "model", head), tmp_path / "out.json"
    assert verify(folder, notes, "--json", file, "--batch-size", 2) == 0
    out, err = capsys.readouterr()
    assert "PASSED" in out and not err
    found = json.loads(file.read_text())
    assert found["passed"] and found["runs_stock"] is None and found["notes"] == 6 and found["notes_cut"] == 0
    combinations = {(r["precision"], r["padding"], r["padded_to"], r["tokens"]) for r in found["rows"]}
    assert len(combinations) == len(found["rows"]) == 2 * 2 * 2 * 2
    assert {c[0] for c in combinations} == {"fp32", "bf16"}
    assert {c[1] for c in combinations} == {"remove", "keep"}
    assert {c[2] for c in combinations} == {"longest", "64"}
    assert {c[3] for c in combinations} == {"1-16", "17-64"}
    for row in found["rows"]:
        assert row["passed"] and not row["stock_calls"] and 0 < row["ours_error"] < 1
        assert (row["labels"] > 0) == (head != "base")
    fp32 = [row for row in found["rows"] if row["precision"] == "fp32"]
    assert all(row["labels_agreed"] == row["labels"] and row["max_difference"] < 1e-3 for row in fp32)
    for part in found["compositions"]:
        assert part["passed"] and part["notes"] == 6
        # A head that is not on the fast path runs stock's own linear, whose bits hang on the batch.
        assert not part["promised"] or part["same"] == 6
    kinds = {(part["precision"], part["batches"]) for part in found["compositions"]}
    assert kinds == {(p, b) for p in ("fp32", "bf16") for b in ("alone", "shuffled", "padded to 64")}


def test_measures_what_clinfast_verify_measures(folder, notes, tmp_path):
    file = tmp_path / "out.json"
    assert verify(folder, notes, "--precision", "fp32", "--json", file) == 0
    row = next(r for r in json.loads(file.read_text())["rows"] if r["tokens"] == "17-64" and r["padding"] == "remove")
    texts = tiny.texts()[3:]
    batch = dict(tiny.tokenizer()(texts, padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    from transformers import BertForTokenClassification

    model = clinfast.optimize(BertForTokenClassification.from_pretrained(folder).eval())
    expected = clinfast.verify(model, batch)
    assert (row["notes"], row["labels"]) == (3, int(batch["attention_mask"].sum()))
    assert row["ours_error"] == pytest.approx(expected.ours_error)
    assert row["stock_error"] == pytest.approx(expected.stock_error)
    assert row["max_difference"] == pytest.approx(expected.max_difference)


@pytest.mark.parametrize("asked", ["bf16", "bf16,fp32", "bf16 fp32"])
def test_precisions_in_the_order_asked(asked, folder, notes, tmp_path):
    file = tmp_path / "out.json"
    assert verify(folder, notes, "--precision", *asked.split(), "--json", file) == 0
    precisions = list(dict.fromkeys(row["precision"] for row in json.loads(file.read_text())["rows"]))
    assert precisions == asked.replace(",", " ").split()


def test_a_bf16_model_comes_first_in_bf16(tmp_path, notes):
    file = tmp_path / "out.json"
    folder = tiny.save(tmp_path / "model", "sequence", dtype=torch.bfloat16)
    assert verify(folder, notes, "--json", file) == 0
    assert [row["precision"] for row in json.loads(file.read_text())["rows"]][::8] == ["bf16", "fp32"]


def test_long_notes_are_cut_and_said_so(folder, tmp_path, capsys):
    long = tmp_path / "folder"
    long.mkdir()
    for number, text in enumerate(tiny.texts((5, 200, 300))):
        (long / f"{number}.txt").write_text(text + "\n")
    assert verify(folder, long, "--precision", "fp32") == 0
    assert "at most 64 tokens, 2 of them longer, and cut" in capsys.readouterr().out
    assert verify(folder, long, "--precision", "fp32", "--max-length", 12) == 0
    assert "at most 12 tokens, 2 of them longer, and cut" in capsys.readouterr().out


def test_jsonl(folder, tmp_path):
    file = tmp_path / "notes.jsonl"
    file.write_text("".join(json.dumps({"id": i, "text": t}) + "\n\n" for i, t in enumerate(tiny.texts((4, 8)))))
    assert verify(folder, file, "--precision", "fp32") == 0


def test_a_single_short_note(folder, tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("pain")
    assert verify(folder, file, "--precision", "fp32") == 0


def shift(monkeypatch, by):
    clean = Encoder.run

    def run(self, request):
        return mapped(clean(self, request), by)

    monkeypatch.setattr(Encoder, "run", run)


@pytest.mark.parametrize(
    "by",
    [lambda x: x + 1e-2, lambda x: x * float("nan"), lambda x: x + float("inf")],
    ids=["added", "nan", "inf"],
)
@pytest.mark.parametrize("threshold", [[], ["--threshold", "1e-3"]], ids=["rule", "threshold"])
def test_fails_on_a_broken_fast_path(by, threshold, folder, notes, tmp_path, monkeypatch, capsys):
    shift(monkeypatch, by)
    # The canary at optimize() meets the same fault where it is a large one; here it is the fast path that breaks later.
    monkeypatch.setattr("clinfast.canary.check", lambda *_: 0.0)
    file = tmp_path / "out.json"
    assert verify(folder, notes, "--precision", "fp32", "--json", file, *threshold) == 1
    out, _ = capsys.readouterr()
    assert "FAILED  8 of 8 combinations" in out and "PASSED" not in out and " far" in out
    found = json.loads(file.read_text())
    assert not found["passed"] and not any(row["passed"] for row in found["rows"])


def test_fails_where_bits_hang_on_the_batch(folder, notes, tmp_path, monkeypatch, capsys):
    shift(monkeypatch, lambda x: x + 1e-7 * len(x))
    file = tmp_path / "out.json"
    assert verify(folder, notes, "--precision", "fp32", "--threshold", "1e-3", "--json", file) == 1
    out = capsys.readouterr().out
    assert "differ" in out and "FAILED  bits differ with the batch in" in out
    found = json.loads(file.read_text())
    assert all(row["passed"] for row in found["rows"])
    assert [part["batches"] for part in found["compositions"] if not part["passed"]] == ["alone", "shuffled"]


def test_labels_that_flip_are_shown(folder, notes, tmp_path, monkeypatch):
    monkeypatch.setattr("clinfast.canary.check", lambda *_: 0.0)
    shift(monkeypatch, lambda x: -x)
    file = tmp_path / "out.json"
    assert verify(folder, notes, "--precision", "fp32", "--json", file) == 1
    assert all(row["labels_agreed"] == 0 < row["labels"] for row in json.loads(file.read_text())["rows"])


def test_threshold_is_the_largest_difference_from_stock(folder, notes, capsys):
    assert verify(folder, notes, "--precision", "fp32", "--threshold", "1e-3") == 0
    assert "within 0.001 from stock" in capsys.readouterr().out
    assert verify(folder, notes, "--precision", "fp32", "--threshold", "0") == 1
    assert "beyond 0 from stock" in capsys.readouterr().out


def test_calls_that_ran_stock_are_no_pass(folder, notes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLINFAST_DISABLE", "1")
    file = tmp_path / "out.json"
    assert verify(folder, notes, "--precision", "fp32", "--json", file) == 1
    out = capsys.readouterr().out
    assert "FAILED  calls ran stock" in out and "CLINFAST_DISABLE" in out and "PASSED" not in out
    assert all(sum(row["stock_calls"].values()) > 0 for row in json.loads(file.read_text())["rows"])


def test_a_refused_model_is_no_pass(tmp_path, notes, capsys):
    folder, file = tiny.save(tmp_path / "model", hidden_act="silu"), tmp_path / "out.json"
    assert verify(folder, notes, "--json", file) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAILED  BertForTokenClassification runs stock: ") and "hidden_act" in out
    found = json.loads(file.read_text())
    assert not found["passed"] and "hidden_act" in found["runs_stock"]


def test_an_unserved_family_is_no_pass(tmp_path, notes, capsys):
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2Model(config).save_pretrained(tmp_path / "gpt")
    tiny.tokenizer().save_pretrained(tmp_path / "gpt")
    assert verify(tmp_path / "gpt", notes) == 1
    assert "GPT2Model runs stock: there is nothing to optimize" in capsys.readouterr().out


def spoil_texts(content):
    def spoil(folder, notes):
        notes.write_bytes(content)

    return spoil


def edit_config(**fields):
    def spoil(folder, notes):
        file = folder / "config.json"
        config = json.loads(file.read_text()) | fields
        file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return spoil


def remove(*patterns):
    def spoil(folder, notes):
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return spoil


def weights_of_another(folder, notes):
    other = tiny.save(folder.parent / "other", hidden_size=96)
    shutil.copy(other / "model.safetensors", folder)


def without_classifier(folder, notes):
    weights = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


BAD = {
    "no-folder": (lambda folder, notes: shutil.rmtree(folder), "model folder {folder} does not exist"),
    "no-config": (remove("config.json"), "holds no config.json"),
    "broken-config": (lambda folder, notes: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "list-config": (lambda folder, notes: (folder / "config.json").write_text("[]"), "is not a JSON object"),
    "no-architecture": (edit_config(architectures=None), "names no architecture"),
    "unknown-architecture": (edit_config(architectures=["BrandNewModel"]), "architecture BrandNewModel is unknown"),
    "remote-code": (
        edit_config(architectures=["MyModel"], auto_map={"AutoModel": "m.MyModel"}), "which is never run",
    ),
    "multiple-choice": (edit_config(architectures=["BertForMultipleChoice"]), "several choices"),
    "no-weights": (remove("*.safetensors"), "the weights in {folder} cannot be read"),
    "broken-weights": (
        lambda folder, notes: (folder / "model.safetensors").write_bytes(b"no weights"), "cannot be read",
    ),
    "other-weights": (weights_of_another, "the weights in {folder} cannot be read"),
    "no-classifier": (without_classifier, "lack classifier.bias and 1 more, so a BertForTokenClassification would"),
    "no-tokenizer": (remove("tokenizer*", "vocab*"), "{folder} holds no tokenizer"),
    "broken-tokenizer": (lambda folder, notes: (folder / "tokenizer.json").write_text("{"), "tokenizer in"),
    "no-texts": (lambda folder, notes: notes.unlink(), "{notes} cannot be read: No such file"),
    "empty-texts": (spoil_texts(b" \n\n"), "there is no text in {notes}"),
    "binary-texts": (spoil_texts(b"dolor \xff\xfe"), "{notes} is not UTF-8 text (byte 6)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_in_one_line(kind, folder, notes, tmp_path, capsys):
    spoil, words = BAD[kind]
    spoil(folder, notes)
    assert verify(folder, notes, "--json", tmp_path / "out.json") == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("clinfast verify: ") and "Traceback" not in err
    assert words.format(folder=folder, notes=notes) in err and len(err) < 500
    assert not (tmp_path / "out.json").exists()


def test_a_file_in_place_of_the_folder(notes, capsys):
    assert verify(notes, notes) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.jsonl", '{"text": "pain"}\n{"note": "pain"}', "line 2: each line must be a JSON object"),
        ("notes.jsonl", "pain", "line 1"),
        ("notes.csv", "pain", "neither a .txt file"),
    ],
)
def test_bad_text_files(name, content, words, folder, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert verify(folder, tmp_path / name) == 2
    assert words in capsys.readouterr().err


def test_a_folder_without_texts(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert verify(folder, tmp_path / "empty") == 2
    assert "no .txt file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--precision", "fp7"], "'fp7' is unknown"),
        (["--precision", "int8"], "cannot be served"),
        (["--max-length", "65"], "at most 64 tokens"),
        (["--max-length", "2"], "no room"),
        (["--json", "/nowhere/out.json"], "/nowhere does not exist"),
        (["--json", "/"], "is a folder"),
    ],
)
def test_option_values_that_do_not_fit(options, words, folder, notes, capsys):
    assert verify(folder, notes, *options) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and words in err


def test_a_tokenizer_of_another_model(tmp_path, notes, capsys):
    folder = tiny.save(tmp_path / "model", vocab_size=12)
    assert verify(folder, notes) == 2
    assert "it belongs to another model" in capsys.readouterr().err


def test_a_fast_path_that_the_canary_rejects_is_no_pass(folder, notes, monkeypatch, capsys):
    shift(monkeypatch, lambda x: x + 1.0)
    assert verify(folder, notes) == 1
    assert "runs stock: the canary batch differs from stock" in capsys.readouterr().out


def test_an_encoder_that_comes_without_a_pooler(tmp_path, notes):
    folder = tiny.save(tmp_path / "model", "no-pooler")
    assert verify(folder, notes, "--precision", "fp32") == 0


def test_a_half_precision_model(tmp_path, notes):
    file = tmp_path / "out.json"
    assert verify(tiny.save(tmp_path / "model", dtype=torch.float16), notes, "--json", file) == 0
    assert {row["precision"] for row in json.loads(file.read_text())["rows"]} == {"fp32", "bf16"}
