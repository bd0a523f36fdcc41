"""The command's face: help at once, `info`, and what is missing."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import clinfast
import clinfast_command
from clinfast import models
from clinfast_command import main

ROOT = Path(clinfast_command.__file__).parent


def test_help_needs_neither_torch_nor_rich():
    script = (
        "import sys, clinfast_command\n"
        "try: clinfast_command.main(['--help'])\n"
        "finally: print(sorted({'torch', 'transformers', 'clinfast', 'rich'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("[]")
    for name in ("info", "verify", "bench"):
        assert re.search(rf"^    {name} ", done.stdout, re.M)


def test_module_is_the_command():
    command = [sys.executable, "-m", "clinfast", "bench", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--peers" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
def test_entry_point_is_declared():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, function = project["project"]["scripts"]["clinfast"].split(":")
    assert getattr(sys.modules[module], function) is main
    assert module in project["tool"]["setuptools"]["py-modules"]
    assert any(need.startswith("rich") for need in project["project"]["optional-dependencies"]["cli"])


@pytest.mark.parametrize(
    ("arguments", "package"),
    [(["info"], "rich"), (["bench", "x", "--plot", "a.png"], "matplotlib")],
    ids=["rich", "matplotlib"],
)
def test_missing_package_is_named(arguments, package, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and package in err and "clinfast[cli]" in err


def test_info(capsys):
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    assert not err
    found = clinfast.info()
    for part in (found.cpu, found.isa, "backend cpu", "fp32, bf16", f"clinfast {clinfast.__version__}", "bert"):
        assert part in out
    assert re.search(r"token classification +all", out) and re.search(r"next sentence prediction +bert,", out)


def test_info_json_lists_every_registered_class(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpu"] == clinfast.info().cpu and found["backends"] == clinfast.info().backends
    assert len(found["families"]) == len(models.FAMILIES)
    assert found["families"]["bert"]["token classification"] == "BertForTokenClassification"
    assert found["families"]["bert"]["base model"] == "BertModel"
    listed = {name for heads in found["families"].values() for name in heads.values()}
    registered = {
        name for adapter in models.FAMILIES.values() for name in importlib.import_module(adapter).CLASSES
    }
    assert listed == registered
    assert found["families"]["roberta"].keys() == found["families"]["xlm-roberta-xl"].keys()
    assert "RobertaPreLayerNormModel" not in found["families"]["roberta"].values()


def test_info_says_why_a_backend_is_not_there(monkeypatch, capsys):
    from clinfast.backends import cpu

    monkeypatch.setattr(cpu, "unavailable", lambda: "no compiled [kernels] for this processor")
    assert main(["info"]) == 0
    assert "not there: no compiled [kernels] for this processor" in capsys.readouterr().out


def test_twins_that_share_an_adapter_have_their_own_column(monkeypatch):
    from clinfast.cli import info

    adapter = type(sys)("shared")
    adapter.CLASSES = dict.fromkeys(("RobertaModel", "XLMRobertaModel", "XLMRobertaForMaskedLM"))
    monkeypatch.setitem(sys.modules, "shared", adapter)
    names = ("roberta", "xlm_roberta")
    monkeypatch.setattr(models, "FAMILIES", {f"transformers.models.{n}.modeling_{n}": "shared" for n in names})
    assert info.families() == {
        "roberta": {"base model": "RobertaModel"},
        "xlm-roberta": {"base model": "XLMRobertaModel", "masked LM": "XLMRobertaForMaskedLM"},
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["speed"], "'speed'"),
        (["verify"], "MODEL_FOLDER, --texts"),
        (["verify", "m", "--texts", "t", "--batch-size", "0"], "'0' is not a whole number"),
        (["verify", "m", "--texts", "t", "--batch-size", "2.5"], "'2.5'"),
        (["verify", "m", "--texts", "t", "--threshold", "-1"], "--threshold"),
        (["verify", "m", "--texts", "t", "--threshold", "nan"], "'nan'"),
        (["verify", "m", "--texts", "t", "--precision", ","], "names nothing"),
        (["bench", "m", "--rounds", "none"], "'none'"),
        (["bench", "m", "--speed"], "--speed"),
    ],
)
def test_wrong_options_in_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and err.count("\n") == 1
    assert words in err and "--help" in err
