import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import compare, gpu_check

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import card_monitor  # noqa: E402
import model_cases  # noqa: E402


def entry(cell="1x128", ours=0.15, fp8=None, model="minilm", card="NVIDIA H200", spread=0.01):
    times = {"clinfast": ours, "eager": 1.0, "compile": 0.3, **({} if fp8 is None else {"clinfast fp8": fp8})}
    return {
        "extra_info": {
            "model": model, "cell": cell, "card": card, "lengths": [128], "utilisation": 0.4,
            "milliseconds": {k: {"synchronous": v, "throughput": v * 0.9} for k, v in times.items()},
            "spread": dict.fromkeys(times, spread), "missing": {"clinfast fp8": "no Hopper"},
        }
    }  # fmt: skip


def results(**facts):
    return compare.merge([{"benchmarks": [entry(**facts), {"extra_info": {}}]}])


def test_merge_table_and_plot(tmp_path, capsys):
    parts = []
    for i, cell in enumerate(("1x16", "1x128")):
        parts.append(tmp_path / f"{i}.json")
        parts[-1].write_text(json.dumps({"benchmarks": [entry(cell, fp8=0.1)], "datetime": "now"}))
    out = tmp_path / "models.json"
    assert compare.main(["merge", str(out), *map(str, parts)]) == 0
    assert set(json.loads(out.read_text())["cells"]) == {"minilm/1x16", "minilm/1x128"}
    row = out.with_suffix(".md").read_text().splitlines()[-1]
    assert row == "| minilm/1x128 | 0.150 | 2.00 (compile) | 0.135 | 2.00 (compile) | 7,407 | 40% | 0.090 |"
    assert out.with_suffix(".png").stat().st_size > 1000
    assert row in capsys.readouterr().out


def test_parts_of_two_cards_are_not_one_run():
    with pytest.raises(ValueError, match="2 cards"):
        compare.merge([{"benchmarks": [entry(), entry("1x16", card="NVIDIA H100")]}])
    with pytest.raises(ValueError, match="0 cards"):
        compare.merge([{"benchmarks": []}])


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        ({"ours": 0.155}, False),  # 3.3%
        ({"ours": 0.165}, True),
        ({"ours": 0.165, "spread": 0.2}, False),  # its own rounds lie further apart
        ({"ours": 0.10}, False),
    ],
)
def test_the_noise_band(change, fails):
    found = compare.slower(results(**change), results())
    assert bool(found) is fails
    if fails:
        assert found[0] == (
            "minilm/1x128, clinfast, synchronous: 0.165 ms against 0.150, +10.0%; the noise band is 5.0%"
        )


def test_three_microseconds_are_no_regression():
    assert compare.slower(results(ours=0.0225), results(ours=0.02)) == []


def test_what_the_baseline_has_and_the_run_has_not():
    assert "not measured" in compare.slower(results(cell="1x16"), results())[0]
    assert compare.slower(results(), results(fp8=0.1)) == [
        "minilm/1x128, clinfast fp8: in the baseline, and now no Hopper"
    ]


def test_check(tmp_path, capsys):
    path = tmp_path / "models.json"
    path.write_text(json.dumps(results(ours=0.2)))
    arguments = ["check", str(path), "--baselines", str(tmp_path)]
    # Neither passed nor slower: a gate that compared nothing must not look green.
    assert compare.main(arguments) == compare.NO_BASELINE
    said = capsys.readouterr().out
    assert said.startswith("NOT COMPARED: there is no baseline of NVIDIA H200") and "those of no card" in said
    other = tmp_path / "nvidia-a100" / "baseline.json"
    other.parent.mkdir()
    other.write_text(json.dumps(results(card="NVIDIA A100")))
    assert compare.main(arguments) == compare.NO_BASELINE
    assert "those of nvidia-a100" in capsys.readouterr().out
    baseline = tmp_path / "nvidia-h200" / "baseline.json"
    baseline.parent.mkdir()
    baseline.write_text(json.dumps(results()))
    assert compare.main(arguments) == 1
    assert "+33.3%" in capsys.readouterr().out
    baseline.write_text("{")
    assert compare.main(arguments) == 2
    assert compare.main(["check", str(tmp_path / "gone.json")]) == 2


def test_a_run_becomes_the_baseline(tmp_path, capsys):
    path, baselines = tmp_path / "models.json", tmp_path / "baselines"
    path.write_text(json.dumps(results()))
    assert compare.main(["check", str(path), "--baselines", str(baselines)]) == compare.NO_BASELINE
    assert f"python -m benchmarks.compare keep {path}" in capsys.readouterr().out
    assert compare.main(["keep", str(path), "--baselines", str(baselines)]) == 0
    assert compare.main(["check", str(path), "--baselines", str(baselines)]) == 0
    path.write_text(json.dumps(results(ours=0.2)))
    assert compare.main(["check", str(path), "--baselines", str(baselines)]) == compare.SLOWER
    path.write_text(json.dumps({"card": "NVIDIA H200", "cells": {}}))
    assert compare.main(["keep", str(path), "--baselines", str(baselines)]) == compare.UNREADABLE


def test_workflow_calls_make_targets_that_are_there():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "gpu-benchmarks.yml").read_text())
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    runs = [step["run"] for step in workflow["jobs"]["gpu"]["steps"] if "run" in step]
    assert runs == ["make gpu-check", "make gpu-compare"]
    assert all(run.removeprefix("make ") in targets for run in runs)


def test_every_cell_is_in_a_stage():
    assert set(" ".join(gpu_check.CELLS).split()) == set(model_cases.cells())
    assert gpu_check.MODELS == model_cases.MODELS
    assert all(f"{model} {cells}" in gpu_check.STAGES for model in gpu_check.MODELS for cells in gpu_check.CELLS)


def test_every_benchmark_of_an_op_is_in_a_stage_and_goals_are_said(tmp_path, monkeypatch):
    files = {path.name for path in (ROOT / "benchmarks" / "gpu").glob("bench_*.py")} - {"bench_models.py"}
    assert {what[0] for what in gpu_check.OPS.values()} == files
    assert all(f"benchmarks: {name}" in gpu_check.STAGES for name in gpu_check.OPS)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    assert gpu_check.goals()["says"] == ["no op was benchmarked"]
    goals = [{"name": "tflops", "least": 200, "found": 231.4, "met": True},
             {"name": "ratio", "least": 1.2, "found": 1.1, "met": False}]  # fmt: skip
    facts = {"goals": goals, "best_peer": "padded SDPA", "ratio": 1.1}
    one = {"name": "bench_varlen_attention[128_tokens]", "extra_info": facts}
    gpu_check.ops_file("attention").write_text(json.dumps({"benchmarks": [one, {"name": "x", "extra_info": {}}]}))
    assert gpu_check.goals()["says"] == [
        "bench_varlen_attention[128_tokens]: tflops 231, wanted at least 200: met (best peer padded SDPA, 1.10)",
        "bench_varlen_attention[128_tokens]: ratio 1.1, wanted at least 1.2: NOT MET (best peer padded SDPA, 1.10)",
    ]


def test_lengths_are_what_they_are_called():
    found = model_cases.cells()
    assert abs(sum(found["squad-64"]) / 64 - 177) < 2 and max(found["squad-64"]) <= 384
    assert sorted(found["ragged-32"])[16] in range(90, 160) and max(found["ragged-32"]) <= 512
    batch = model_cases.inputs([3, 5], "cpu")
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    assert model_cases.flops("bert-base", [128]) == pytest.approx(128 * (169.9e6 + 0.0369e6 * 128), rel=1e-3)
    assert model_cases.flops("bert-large", [384]) == pytest.approx(246.4e9, rel=1e-3)


def test_the_varlen_peer_computes_the_model(monkeypatch):
    from transformers import BertConfig, BertModel

    from clinfast.backends import torch as plain

    module = type(torch)("varlen")
    module.varlen_attn = lambda q, k, v, cu_q, cu_k, *_: plain.attention(q, k, v, cu_q, cu_k, None, q.shape[2] ** -0.5)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 96}
    config = BertConfig(vocab_size=20000, **sizes)
    stock = BertModel(config).eval()
    batch = model_cases.inputs([9, 4, 17], "cpu")
    with torch.no_grad():
        ours, expected = model_cases.varlen(stock)(**batch), stock(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real], expected[real], rtol=1e-4, atol=1e-5)


def test_card_monitor(monkeypatch):
    rows = [["301.5", "1980", "2619", "50", "0x0"], ["310.5", "1900", "[N/A]", "51", "0x4"]]
    found = card_monitor.summary(rows)
    assert found["power.draw"] == {"mean": 306.0, "least": 301.5, "most": 310.5}
    assert found["clocks.mem"]["mean"] == 2619 and found["clocks_event_reasons.active"] == ["0x0", "0x4"]
    left = copy.deepcopy(rows)
    monkeypatch.setattr(card_monitor, "sample", lambda: left.pop() if left else None)
    with card_monitor.Monitor() as seen:
        seen._thread.join(5)
    assert seen.summary()["samples"] == 2


def test_host_time_until_the_launch(monkeypatch):
    """On a stand-in for the device: the launches are seen, the results are the same, and the graphs come back."""
    sys.path.insert(0, str(ROOT / "tests" / "engine"))
    import host_work
    from engine_fakes import with_graphs
    from transformers import BertConfig, BertModel

    import clinfast

    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 96}
    model = clinfast.optimize(BertModel(BertConfig(vocab_size=20000, **sizes)).eval(), strict=True)
    batch = model_cases.inputs([9], "cpu")
    driver, graphs = with_graphs(model)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        replays, waits = driver.replays, []
        found = host_work.until_launch(graphs, lambda: model(**batch), lambda: waits.append(1), calls=20)
        assert driver.replays == replays + 20 == replays + len(waits)
        assert 0 < found["median"] <= found["p90"]
        assert torch.equal(model(**batch).last_hidden_state, expected)
        assert all(type(c.graph) is not host_work._Timed for lane in graphs.pool.lanes for c in lane.graphs.values())
        with pytest.raises(RuntimeError, match="launched no graph"):
            host_work.until_launch(graphs, lambda: None, lambda: None, calls=1)


@pytest.fixture
def check(tmp_path, monkeypatch):
    """gpu-check on a card that there is not, with stages that do nothing; what they answer, and which ran."""
    answers, ran = {name: 0 for name in gpu_check.STAGES}, []

    def stage(name):
        return lambda: ran.append(name) or {"status": answers[name], "tail": f"the end of {name}"}

    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "gpu_reason", lambda: None)
    monkeypatch.setattr(gpu_check, "environment", lambda: {"card": "NVIDIA H200", "commit": "0123456789abcdef"})
    monkeypatch.setattr(gpu_check, "STAGES", {name: stage(name) for name in gpu_check.STAGES})

    def run(*arguments):
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["gpu-check", *arguments])
        return gpu_check.main(), list(ran)

    return answers, run


def test_a_stage_that_fails_does_not_keep_the_others_from_running(check, capsys):
    answers, run = check
    answers["sanitizer"] = 1
    status, ran = run("--stages", ",".join(gpu_check.STAGES))
    assert status == 1 and ran == list(gpu_check.STAGES)
    said = capsys.readouterr().out
    assert "the end of sanitizer" in said and "gpu-check: failed: sanitizer; results: " in said
    answers["sanitizer"] = 0
    assert run("--stages", ",".join(gpu_check.STAGES)) == (0, ["sanitizer"])  # what had passed is not done again


def test_without_a_build_nothing_else_is_tried(check, capsys):
    answers, run = check
    answers["build"] = 2
    assert run("--stages", ",".join(gpu_check.STAGES)) == (1, ["environment", "build"])
    assert "build failed with status 2" in capsys.readouterr().out


def test_packages_that_are_not_there_are_named_before_anything_runs(check, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "REQUIRED", ("torch", "no_such_package"))
    assert check[1]("--stages", "build") == (1, [])
    assert "has no no_such_package; install them" in capsys.readouterr().out


def test_folders_of_the_gpu_stages_hold_all_tests_marked_gpu():
    marked = [f for f in (ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.gpu\b", f.read_text())]
    machine = (ROOT / "tests" / "cuda").rglob("test_*.py")  # by their fixture
    assert {f.relative_to(ROOT).parts[1] for f in (*marked, *machine)} == {"cuda", "gpu"}
