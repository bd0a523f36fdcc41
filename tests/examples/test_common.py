"""How the examples end: exit statuses, one line for what is wrong."""

import functools
import subprocess
import sys
from pathlib import Path

import common
import pytest
import torch
from bert_models import make

import clinfast


def raising(problem):
    def main():
        raise problem

    return main


@pytest.mark.parametrize(
    "problem, status, sentence",
    [
        (common.Problem("the folder is gone"), 2, "the folder is gone"),
        (clinfast.StrictError("would run stock"), 2, "would run stock"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on from here"),
    ],
)
def test_exit_statuses(capsys, monkeypatch, problem, status, sentence):
    monkeypatch.setattr(sys, "argv", ["/somewhere/example.py"])
    assert common.run(raising(problem)) == status
    assert capsys.readouterr().err == f"example.py: {sentence}\n"
    assert common.run(lambda: 1) == 1


def test_the_command_of_the_docstring_with_a_wrong_folder(tmp_path):
    script = Path(common.__file__).parent / "ner_folder.py"
    (tmp_path / "a.txt").write_text("a")
    command = [sys.executable, str(script), "--model", "nowhere", "--notes", str(tmp_path), "--out", "spans.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "ner_folder.py: the model folder nowhere does not exist\n"


@pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning")
def test_the_summary_is_one_line_with_the_reasons_of_stock_calls():
    model = make("token")
    assert common.make_fast(model)
    with torch.inference_mode():
        model(torch.ones(1, 4, dtype=torch.long))
        model(torch.ones(1, 4, dtype=torch.long), output_attentions=True)
    told = common.summary(model)
    assert told.startswith("clinfast: 1 fast calls, 1 stock calls (1 x ") and "output_attentions" in told
    assert "\n" not in told


def test_a_model_that_is_refused_runs_stock_and_says_why():
    model = make("token")
    for module in (model, model.bert):
        module.forward = functools.partial(type(module).forward, module)
    assert not common.make_fast(model)
    assert "already has a forward of its own" in common.summary(model)
    clinfast.restore(model)
    with pytest.raises(common.Problem, match="already has a forward of its own"):
        common.make_fast(model, strict=True)


def test_half_precision_folders_are_computed_in_fp32(tmp_path):
    make("token", dtype=torch.float16).save_pretrained(tmp_path)
    assert common.load_model(tmp_path, "AutoModelForTokenClassification").dtype is torch.float32
