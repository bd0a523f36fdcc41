"""The harness itself: shapes, ratios, goals, the result file, and the workers' life and death."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.harness import goals
from benchmarks.harness.sources import model_source
from clinfast.bench import cache, process, results
from clinfast.bench.cells import CELLS, make_batch, parse_cell
from clinfast.bench.contenders import CONTENDERS, contender_class
from clinfast.bench.race import ParityError, Race, Runner, ratio
from clinfast.bench.reference import output_error


def test_ragged_cell_is_what_the_readme_says() -> None:
    cell = CELLS["ragged32"]
    assert cell.batch_size == 32
    assert cell.padded_length == 512
    assert np.median(cell.lengths) == 120
    assert 0.35 < cell.tokens_real / cell.tokens_padded < 0.37
    assert list(cell.lengths) != sorted(cell.lengths)


@pytest.mark.parametrize("name", ["4x64", "ragged8", *CELLS])
def test_batches_are_padded_on_the_right_and_repeat(name: str) -> None:
    cell = parse_cell(name)
    batch, again = make_batch(cell, 30522), make_batch(cell, 30522)
    assert batch.input_ids.shape == (cell.batch_size, cell.padded_length)
    assert tuple(batch.lengths) == cell.lengths
    assert (np.diff(batch.attention_mask, axis=1) <= 0).all()
    assert (batch.input_ids[batch.attention_mask == 0] == 0).all()
    assert (batch.input_ids[batch.attention_mask == 1] > 0).all()
    assert (batch.input_ids == again.input_ids).all()


@pytest.mark.parametrize("name", ["0x4", "1x", "dense", "ragged0", ""])
def test_unknown_cell_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"cell '{name}'"):
        parse_cell(name)


def test_output_error_is_relative_to_the_reference() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 0.0]])
    error = output_error(reference + np.array([[0.0, 0.0], [0.0, 0.5]]), reference)
    assert error.relative == pytest.approx(0.1)
    assert error.max_abs == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        output_error(reference[:1], reference)


def test_ratio_is_taken_round_by_round() -> None:
    base, peer = (Runner(name, worker=None) for name in "ab")  # type: ignore[arg-type]
    base.rounds = [[1.0, 1.0], [10.0], [2.0]]
    peer.rounds = [[2.0], [30.0, 30.0], [8.0]]
    assert ratio(peer, base) == {"median": 3.0, "min": 2.0, "max": 4.0}


def record(cell: str, **over_clinfast: float) -> dict[str, Any]:
    contenders: dict[str, Any] = {
        name: {"status": "ok", "over_clinfast": {"median": value}} for name, value in over_clinfast.items()
    }
    return {"model": "bert-base", "precision": "fp32", "cell": cell, "contenders": contenders}


def test_result_file_adds_up_over_runs_and_replaces_a_cell(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results.json"
    old = {"commit": "old", "date": "2020"}
    new = {"commit": "new", "date": "2021"}
    results.add(file, record("1x16", stock=2.0), old)
    results.add(file, record("1x128", stock=3.0), old)
    results.add(file, record("1x16", stock=4.0), new)
    found = results.read(file)
    assert set(found["cells"]) == {"bert-base/fp32/1x16", "bert-base/fp32/1x128"}
    again = found["cells"]["bert-base/fp32/1x16"]
    assert again["contenders"]["stock"]["over_clinfast"]["median"] == 4.0
    assert again["date"] == "2021"
    commits = {found["environments"][cell["environment"]]["commit"] for cell in found["cells"].values()}
    assert commits == {"old", "new"}
    results.add(file, record("1x128"), new)
    assert [env["commit"] for env in results.read(file)["environments"].values()] == ["new"]


def test_goals_take_the_faster_of_the_peers_that_ran(tmp_path: Path) -> None:
    file = tmp_path / "goals.json"
    file.write_text(
        '{"bert-base/fp32": {"best_of:onnxruntime,openvino": {"1x16": 1.5, "1x128": 1.5, "8x128": 1}}}'
    )
    found = results.empty()
    results.merge(found, record("1x16", clinfast=1.0, onnxruntime=2.0, openvino=1.4), {"date": ""})
    results.merge(found, record("1x128", clinfast=1.0, onnxruntime=2.0), {"date": ""})
    first, second, third = goals.verdicts(found, file)
    assert (first.reached, first.met) == (1.4, False)
    assert (second.reached, second.met) == (2.0, True)
    assert (third.reached, third.met) == (None, False)


def test_every_contender_is_found_by_its_name() -> None:
    for name, cls in CONTENDERS.items():
        assert contender_class(name) is cls
        assert cls.name == name
        assert set(cls.precisions) <= {"fp32", "bf16"}
    with pytest.raises(ValueError, match="'unheard'"):
        contender_class("unheard")


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"


def test_race_holds_its_workers_checks_parity_and_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = parse_cell("1x16")
    with Race(model_source("minilm", 2), "bf16", ["stock", "ctranslate2", "gemm_floor"], threads=2) as race:
        pids = [worker.pid for worker in race.workers.values()]
        race.enter_cell(cell)
        assert "bf16" in race.skipped["ctranslate2"]
        for number in range(2):
            for name in race.order(number):
                assert {state(pid) for pid in pids} == {"T"}
                assert race.step(name) > 0
        entry = race.record()
        assert entry["contenders"]["ctranslate2"]["status"] == "skipped"
        stock, floor = entry["contenders"]["stock"], entry["contenders"]["gemm_floor"]
        assert stock["over_stock"] == {"median": 1.0, "min": 1.0, "max": 1.0}
        assert 0 < stock["error"]["last_hidden_state"]["relative"] < 0.05
        assert floor["gflops"] == pytest.approx(entry["gemm_gflop"] / floor["median_ms"] * 1e3)

        twin = race.runners["stock"]
        race.runners["clinfast"] = Runner("clinfast", twin.worker, facts=copy.deepcopy(twin.facts))
        race._check_parity()
        race.runners["clinfast"].facts["error"]["pooler_output"]["relative"] *= 2.1
        with pytest.raises(ParityError, match="pooler_output"):
            race._check_parity()
    assert {state(pid) for pid in pids} == {"gone"}


def test_worker_that_dies_is_reported_with_its_last_words() -> None:
    source = model_source("minilm", 2)
    worker = process.WorkerProcess("gemm_floor", source, "fp32", 2)
    try:
        worker.ask("load")
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(process.ContenderFailed, match="code -9"):
            worker.ask("prepare", make_batch(parse_cell("1x16"), source.vocab_size))
    finally:
        worker.close()


def test_stopped_worker_does_not_outlive_a_killed_parent() -> None:
    script = (
        "import time\n"
        "from benchmarks.harness.sources import model_source\n"
        "from clinfast.bench.process import WorkerProcess\n"
        "worker = WorkerProcess('gemm_floor', model_source('minilm', 2), 'fp32', 2)\n"
        "worker.ask('load')\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=cache.ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while state(pid) not in ("gone", "Z") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert state(pid) in ("gone", "Z")
