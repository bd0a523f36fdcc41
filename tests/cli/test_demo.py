"""The demo end to end on a tiny model."""

import json

import pytest
import tiny

from clinfast.demo.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_before_and_after(tmp_path, notes, capsys):
    folder, out = tiny.save(tmp_path / "model", "base"), tmp_path / "results"
    options = ["--model", folder, "--notes", notes, "--batch-size", 3, "--rounds", 2, "--threads", 1, "--out", out]
    assert main([str(option) for option in options]) == 0
    said, err = capsys.readouterr()
    assert not err
    for part in ("notes per second", "CPU-hours per million notes", "smallest cosine with stock", "restored"):
        assert part in said
    found = json.loads((out / "demo.json").read_text())
    assert found["notes"] == found["timed_notes"] == 6 and found["threads"] == 1
    # Two batches in two rounds, and one call to warm up.
    assert found["calls_fast"] == found["calls_optimized"] == 5 and not found["fallbacks"]
    assert found["sides"]["clinfast"]["error_against_float64"] < 1e-4 and found["smallest_cosine"] > 0.99999
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "words"), [("--model", "does not exist"), ("--notes", "give --notes FILE")]
)
def test_what_is_missing_is_said_in_one_line(option, words, tmp_path, notes, capsys):
    given = {"--model": str(tiny.save(tmp_path / "model", "base")), "--notes": str(notes), "--out": str(tmp_path)}
    given[option] = str(tmp_path / "absent")
    assert main([part for pair in given.items() for part in pair]) == 1
    err = capsys.readouterr().err
    assert err.startswith("clinfast demo: ") and err.count("\n") == 1 and words in err
