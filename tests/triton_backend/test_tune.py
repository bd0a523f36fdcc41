import argparse
import json

import pytest

import clinfast_command
from clinfast.cli import tune
from clinfast.model_folder import BadInput
from clinfast.triton_kernels import configs


def fake(of_class=90, library=10.0):
    """A card whose calls take a time that the tiles decide; some do not run at all."""
    asked = []

    def attend(head_dim, kind, tiles):
        if tiles["block_m"] == 128 and tiles["num_stages"] == 3:
            raise RuntimeError("out of resource: shared memory")
        return abs(tiles["block_n"] - head_dim) + tiles["num_stages"] + tiles["num_warps"] / 100

    def multiply(in_features, out_features, rows, tiles):
        asked.append((in_features, out_features, rows))
        return 1 + (tiles["block_m"] != (64 if rows == 64 else 128)) + tiles["num_warps"] / 100

    table = tune.tune(
        of_class, "a card", [(256, 512)], [64], attend, multiply, lambda k, n: library, lambda call: call()
    )
    return table, asked


def test_the_fastest_tiles_that_run_are_written():
    table, asked = fake()
    assert table["card"] == "a card" and table["measured"] and table["device_class"] == 90
    assert table["attention"]["16 bit, head_dim 64"]["long"] == {
        "block_m": 32, "block_n": 64, "num_warps": 4, "num_stages": 1
    }  # fmt: skip
    assert table["attention"]["16 bit, head_dim 64"]["few"]["block_m"] == 16
    entry = table["linear"]["256 x 512"]
    assert [part["tiles"]["block_m"] for part in entry["tiles"]] == [64, 128, 128]
    assert entry["fused"] == ["gelu", "gelu_tanh", "relu"] and all(part["tiles"]["tma"] for part in entry["tiles"])
    assert {rows for _, _, rows in asked} == {64, 1024, None}


def test_the_library_keeps_what_it_does_faster():
    assert fake(of_class=80, library=0.5)[0]["linear"]["256 x 512"]["fused"] == []


def test_what_was_written_is_read(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(fake()[0]))
    monkeypatch.setenv("CLINFAST_TUNING_TABLE", str(path))
    for function in (configs.table, configs.linear, configs.attention):
        function.cache_clear()
    try:
        assert configs.linear(90, 2, 256, 512, 64).block_m == 64
        assert configs.attention(90, 2, 64, "long").block_m == 32
    finally:
        monkeypatch.undo()
        for function in (configs.table, configs.linear, configs.attention):
            function.cache_clear()


def test_no_gpu_and_bad_shapes_are_sentences(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(tune.registry, "unavailable", lambda backend: "torch sees no NVIDIA GPU")
    assert clinfast_command.main(["tune"]) == clinfast_command.BAD_INPUT
    assert "there is nothing to tune: torch sees no NVIDIA GPU" in capsys.readouterr().err
    with pytest.raises(BadInput, match="'768' is not IN_FEATURESxOUT_FEATURES"):
        tune._shape("768")
    with pytest.raises(BadInput, match="no tiles run on this card: no memory"):
        tune.best([{}], lambda tiles: (_ for _ in ()).throw(RuntimeError("no memory")), lambda call: call())


def test_options(tmp_path):
    options = clinfast_command.parser().parse_args(["tune", "--head-dims", "32,128", "--linear", "64x128"])
    assert isinstance(options, argparse.Namespace)
    assert options.head_dims == [32, 128] and options.linear == ["64x128"]
