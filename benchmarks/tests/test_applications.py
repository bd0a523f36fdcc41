import json

import numpy as np
import pytest

from benchmarks import applications
from benchmarks.harness.command import main


def test_texts_are_notes_and_pairs():
    notes, pairs = applications.texts("encode"), applications.texts("cross-encoder")
    assert (len(notes), len(pairs)) == (1000, 64)
    assert notes[0] == notes[320] and len(set(notes)) == 320
    assert {question for question, _ in pairs} == set(applications.QUESTIONS)


def test_an_unknown_task_is_named(tmp_path, capsys):
    assert main(["applications", "--tasks", "enkode", "--json", str(tmp_path / "r.json")]) == 2
    assert "enkode is none of encode, cross-encoder" in capsys.readouterr().out
    assert main(["applications", "--precisions", "fp64", "--json", str(tmp_path / "r.json")]) == 2
    assert "fp64 is none of fp32, bf16" in capsys.readouterr().out


@pytest.mark.slow
def test_a_race_of_two_processes(tmp_path, monkeypatch):
    monkeypatch.setitem(applications.COUNTS, "cross-encoder", 6)
    file = tmp_path / "results.json"
    command = ["applications", "--tasks", "cross-encoder", "--precisions", "fp32", "--rounds", "2"]
    command += ["--threads", "1", "--json", str(file)]
    assert main(command) == 0
    record = json.loads(file.read_text())["applications"]["cross-encoder/fp32"]
    assert record["rounds"] == 2 and record["seconds"]["stock"] > 0 < record["seconds"]["clinfast"]
    ratio = record["over_clinfast"]["stock"]
    assert ratio["min"] <= ratio["median"] <= ratio["max"]
    assert 0 < record["relative_error"]["clinfast"] < 1e-5 and 0 < record["relative_error"]["stock"] < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_timed_where_the_outputs_are_wrong(monkeypatch, precision):
    class Wrong:
        def __init__(self, task, name, threads):
            self.name = name

        def run(self, count):
            if count != applications.COMPARED:
                pytest.fail("timed")
            return 1.0, np.ones((2, 3)) + (1e-2 if self.name.startswith("clinfast") else 0), 1

        def close(self):
            pass

    monkeypatch.setattr(applications, "Side", Wrong)
    monkeypatch.setitem(applications.COUNTS, "encode", 9)
    with pytest.raises(AssertionError):
        applications.race("encode", 1, 1, precision)
