"""`clinfast bench` through its entry function: one real race, the table and figure of a made one, bad input."""

import json
import os

import bert_models
import pytest

from clinfast.bench import cache, results
from clinfast.bench.race import ParityError
from clinfast.bench.tables import cost_table
from clinfast.cli import bench as command
from clinfast_command import main

QUICK = ("--peers", "none", "--rounds", 1, "--threads", 1)


def bench(folder, *options):
    return main(["bench", str(folder), *map(str, options)])


@pytest.mark.slow
def test_a_race(folder, notes, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    file, plot = tmp_path / "out.json", tmp_path / "speed.svg"
    options = ("--cells", "ragged4", "--texts", notes, "--json", file, "--plot", plot)
    assert bench(folder, *options, *QUICK) == 0
    out, err = capsys.readouterr()
    assert not err and cache.VARIABLE not in os.environ
    ragged = "ragged4: 4 notes of texts, 24 tokens in the mean, padded to 52"
    for part in ("deid, fp32, 1 thread", "ragged4, 54% padding", ragged, "CPU-hours per"):
        assert part in out
    assert plot.read_text().lstrip().startswith("<?xml")
    found = json.loads(file.read_text())
    assert found["schema"] == results.SCHEMA and found["failures"] == []
    assert list(found["cells"]) == ["deid/fp32/ragged4"]
    cell = found["cells"]["deid/fp32/ragged4"]
    # Of notes of 5, 11, 16, 22, 35 and 52 tokens, those at the quantiles 1/8, 3/8, 5/8, 7/8.
    assert (cell["tokens_real"], cell["padded_length"], cell["batch_size"]) == (5 + 16 + 22 + 52, 52, 4)
    assert list(cell["contenders"]) == ["stock", "clinfast"]
    assert (cell["inputs"], cell["threads"], cell["rounds"]) == ("texts", 1, 1)
    for contender in cell["contenders"].values():
        assert contender["status"] == "ok" and 0 < contender["error"]["logits"]["relative"] < 1e-5
        seconds = contender["median_ms"] / 1e3
        assert contender["notes_per_second"] == pytest.approx(4 / seconds, rel=1e-3)
        assert contender["cpu_hours_per_million_notes"] == pytest.approx(seconds / 3600 / 4 * 1e6, rel=1e-3)
    assert cell["contenders"]["clinfast"]["notes"]["kernel_calls"]


def without(monkeypatch, **absent):
    """A race of which these could not be loaded."""

    class Stub:
        def __init__(self, *_):
            self.absent = absent

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(command, "Race", Stub)


def test_a_model_that_is_refused_fails(folder, monkeypatch, tmp_path, capsys):
    without(monkeypatch, clinfast="hidden_act 'silu' is not served")
    assert bench(folder, "--cells", "1x4", "--json", tmp_path / "out.json", *QUICK) == 1
    said = "fp32: clinfast cannot run this model: hidden_act 'silu' is not served"
    assert capsys.readouterr().out == f"FAILED  {said}\n"
    assert json.loads((tmp_path / "out.json").read_text())["failures"] == [said]


def test_broken_weights_are_bad_input(folder, monkeypatch, capsys):
    without(monkeypatch, stock="the weights cannot be read: incomplete metadata")
    assert bench(folder, "--cells", "1x4", *QUICK) == 2
    out, err = capsys.readouterr()
    assert not out and err == "clinfast bench: the weights cannot be read: incomplete metadata\n"


def test_inexact_results_fail(folder, monkeypatch, capsys):
    without(monkeypatch)

    def inexact(*_):
        raise ParityError("deid fp32 1x4: clinfast has a relative error of 1 in logits")

    monkeypatch.setattr(command, "run_cell", inexact)
    assert bench(folder, "--cells", "1x4", *QUICK) == 1
    assert capsys.readouterr().out == "FAILED  deid fp32 1x4: clinfast has a relative error of 1 in logits\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cells", "1x400"], "--cells 1x400: this model takes at most 64 tokens"),
        (["--cells", "huge"], "cell 'huge'"),
        (["--peers", "fastest"], "'fastest' is unknown"),
        (["--peers", "stock"], "'stock' is unknown"),
        (["--precision", "int8"], "'int8' is not raced"),
        (["--plot", "speed.doc"], "must end in .png"),
        (["--plot", "/nowhere/speed.png"], "/nowhere does not exist"),
        (["--json", "/nowhere/out.json"], "/nowhere does not exist"),
        (["--texts", "none.txt"], "none.txt cannot be read"),
        (["--texts", "none.txt", "--cells", "1x4"], "--cells names none"),
    ],
)
def test_bad_input_in_one_line(options, words, folder, capsys):
    assert bench(folder, *options) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("clinfast bench: ") and words in err


def test_no_folder(tmp_path, capsys):
    assert bench(tmp_path / "model") == 2
    assert "does not exist" in capsys.readouterr().err


def test_peers():
    assert command.peers(["none"]) == ()
    assert command.peers(["auto"]) == ("torch_compile", "onnxruntime", "openvino", "ctranslate2")
    assert command.peers(["openvino", "torch_compile"]) == ("torch_compile", "openvino")


def contender(ms, **more):
    error = {"logits": {"relative": 5e-7, "max_abs": 1e-6}}
    rates = {"notes_per_second": 4e3 / ms, "cpu_hours_per_million_notes": ms / 14.4}
    return {"status": "ok", "median_ms": ms, "others_cores": 0.0, "error": error, **rates, **more}


def test_table_shows_who_was_skipped_and_what_was_disturbed():
    from rich.console import Console

    entry = {"cell": "4x9", "batch_size": 4, "padded_length": 9, "tokens_real": 36, "tokens_padded": 36}
    entry["contenders"] = {
        "stock": contender(20.0, over_stock={"median": 1.0}),
        "openvino": {"status": "skipped", "reason": "not installed: pip install openvino"},
        "clinfast": contender(5.0, over_stock={"median": 0.25}, others_cores=0.5),
    }
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(cost_table("model", {"4x9": entry}))
    stock, openvino, ours = console.export_text().split("4x9")[1].strip().splitlines()[:3]
    assert stock.split()[-5:] == ["20.0", "200", "1.00", "5.0e-07", "1.4"]
    assert openvino.split() == ["OpenVINO", "skipped"]
    assert ours.split() == ["clinfast", "5.00*", "800", "4.00", "5.0e-07", "0.35"]


def test_an_absent_peer_is_skipped_by_name(tmp_path, monkeypatch):
    from clinfast.bench import race
    from clinfast.bench.contenders.openvino import OpenVino
    from clinfast.bench.sources import ModelSource

    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(OpenVino, "distributions", ("openvino-of-nowhere",))
    bert_models.make().save_pretrained(tmp_path / "model")
    source = ModelSource.at(tmp_path / "model")
    contest = race.Race(source, "fp32", ["openvino"], 1)
    contest._load("openvino")
    assert contest.absent == {"openvino": "not installed: pip install openvino-of-nowhere"} and not contest.workers
