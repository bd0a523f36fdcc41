import argparse
import json

import pytest
import torch

import clinfast_command
from clinfast.backends import racing
from clinfast.cli import tune
from clinfast.model_folder import BadInput
from clinfast.ops import choices
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


HALF = torch.bfloat16
TIMES = {
    ("layer_norm", 1024): {"triton": 4.0, "cuda": 5.0, "torch": 9.0},
    ("layer_norm", None): {"triton": 4.95, "cuda": 5.0, "torch": 9.0},  # within the noise of what was reasoned
    ("attention", None): {"cuda": 7.0, "torch": 6.0},
    ("gelu", None): {"torch": 6.0},
}


def chosen(capability=(9, 0), results=None, fails=()):
    """Backends whose calls take a fixed time; `results`: what each gives, where it is not what PyTorch gives."""

    def calls(op, dtype, max_rows, name):
        if name not in TIMES[op, max_rows]:
            return None

        def call():
            if (op, name) in fails:
                raise RuntimeError("no kernel image\nfor this card")
            call.time = TIMES[op, max_rows][name]
            return torch.full((3,), (results or {}).get((op, name), 1.0), dtype=dtype)

        return call

    def microseconds(call, op):
        call()
        return call.time

    of_ops = [(op, HALF, rows) for op, rows in TIMES]
    names = ["triton", "cuda", "torch"]
    rows, left_out = tune.choose(of_ops, names, calls, racing.agrees, microseconds, capability)
    return {(row["op"], row["max_rows"]): row["backend"] for row in rows}, left_out, rows


def test_the_fastest_backend_of_each_op_and_size():
    found, left_out, rows = chosen()
    # One that PyTorch alone offers is no choice.
    assert found == {("layer_norm", 1024): "triton", ("layer_norm", None): "cuda", ("attention", None): "torch"}
    assert not left_out
    assert rows[0] == {"op": "layer_norm", "dtype": "bfloat16", "max_rows": 1024, "backend": "triton",
                       "microseconds": {"triton": 4.0, "cuda": 5.0, "torch": 9.0}}  # fmt: skip


def test_a_backend_that_is_wrong_or_fails_is_no_contender_and_said_so():
    found, left_out, _ = chosen(results={("layer_norm", "triton"): 1.1}, fails={("attention", "cuda")})
    assert found == {("layer_norm", 1024): "cuda", ("layer_norm", None): "cuda"}
    assert left_out == [
        "triton for layer_norm in torch.bfloat16 up to 1024 tokens: its result is not PyTorch's",
        "triton for layer_norm in torch.bfloat16 of any size: its result is not PyTorch's",
        "cuda for attention in torch.bfloat16 of any size: no kernel image",
    ]


@pytest.mark.parametrize("of_request", [True, False])
def test_what_is_raced_runs_and_agrees_with_itself(of_request):
    """Every op that `tune` times, on the CPU by PyTorch and by the compiled kernels of this machine."""
    seen = set()
    for op, dtype, max_rows in racing.of_ops():
        if dtype is torch.float16 or (max_rows is not None) is not of_request:
            continue
        theirs = racing.call(op, dtype, max_rows, "torch", "cpu")
        ours = racing.call(op, dtype, max_rows, "cpu", "cpu")
        if ours is None:
            continue
        seen.add(op)
        assert racing.agrees(ours(), theirs(), dtype), op
    assert {"attention", "layer_norm", "embedding", "unpack", "pack"} <= seen or not of_request


def test_a_table_with_backends_is_read_back(tmp_path, monkeypatch):
    """What `run` writes, through the file, to the choice."""
    rows, table = chosen()[2], fake()[0] | {"backends": chosen()[2]}
    assert rows
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    monkeypatch.setenv("CLINFAST_TUNING_TABLE", str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    for cache in (choices.measured, choices.measured_choices):
        cache.cache_clear()
    try:
        assert choices.ranked("layer_norm", ["triton", "cuda", "torch"], HALF, (9, 0), 1024)[0] == "triton"
        assert choices.ranked("attention", ["triton", "cuda", "torch"], HALF, (9, 0))[0] == "torch"
    finally:
        for cache in (choices.measured, choices.measured_choices):
            cache.cache_clear()
