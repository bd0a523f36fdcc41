"""Copies, files and processes: each is a clean stock model of stock size that works without clinfast."""

import copy
import filecmp
import gc
import inspect
import io
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from bert_models import assert_equal, make, run
from patched_models import INPUTS, Pair

import clinfast
from clinfast import patch

OURS = {"forward", "__getstate__", "_replicate_for_data_parallel"}
heads = pytest.mark.parametrize("head", ["base", "sequence", "token", "qa"])


def assert_stock(copied, stock):
    assert not any(OURS & module.__dict__.keys() for module in copied.modules())
    assert patch.find_patched(copied) == []
    assert_equal(run(copied, **INPUTS), run(stock, **INPUTS))


@heads
def test_deep_copies_are_stock(head):
    pair = Pair(head)
    assert_stock(copy.deepcopy(pair.model), pair.stock)
    pair.check_fast()


@pytest.mark.parametrize("head", ["base", "sequence", "token"])
def test_shallow_copies_are_stock(head):
    pair = Pair(head)
    assert_stock(copy.copy(pair.model), pair.stock)
    pair.check_fast()


def test_a_deep_copy_has_weights_of_its_own():
    pair = Pair()
    copied = copy.deepcopy(pair.model)
    with torch.no_grad():
        pair.model.embeddings.word_embeddings.weight.zero_()
    assert_equal(run(copied, **INPUTS), run(pair.stock, **INPUTS))


@heads
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_stock(head, protocol):
    pair = Pair(head)
    run(pair.model, **INPUTS)
    run(pair.stock, **INPUTS)
    data = pickle.dumps(pair.model, protocol)
    assert len(data) == len(pickle.dumps(pair.stock, protocol))
    assert b"clinfast" not in data
    assert_stock(pickle.loads(data), pair.stock)


@heads
def test_torch_save_is_stock(head):
    pair = Pair(head)
    file, stock_file = io.BytesIO(), io.BytesIO()
    torch.save(pair.model, file)
    torch.save(pair.stock, stock_file)
    assert abs(len(file.getvalue()) - len(stock_file.getvalue())) < 4096
    file.seek(0)
    assert_stock(torch.load(file, weights_only=False), pair.stock)


LOAD = """
import pickle, sys
sys.modules["clinfast"] = None
import torch
kind, path = sys.argv[1:]
if kind == "pickle":
    model = pickle.load(open(path, "rb"))
elif kind == "torch":
    model = torch.load(path, weights_only=False)
else:
    from transformers import AutoModel
    model = AutoModel.from_pretrained(path).eval()
inputs = torch.load(path + ".inputs")
with torch.no_grad():
    torch.save(model(**inputs).last_hidden_state, path + ".out")
"""


@pytest.mark.parametrize("kind", ["pickle", "torch", "folder"])
def test_a_process_without_clinfast_loads_it(kind, tmp_path):
    pair = Pair()
    path = str(tmp_path / "model")
    if kind == "pickle":
        with open(path, "wb") as file:
            pickle.dump(pair.model, file)
    elif kind == "torch":
        torch.save(pair.model, path)
    else:
        pair.model.save_pretrained(path)
    torch.save(INPUTS, path + ".inputs")
    subprocess.run([sys.executable, "-c", LOAD, kind, path], check=True, timeout=300)
    expected = run(pair.stock, **INPUTS)["last_hidden_state"]
    torch.testing.assert_close(torch.load(path + ".out"), expected, rtol=1e-5, atol=1e-5)


@heads
def test_saved_folders_are_byte_identical(head, tmp_path):
    pair = Pair(head)
    run(pair.model, **INPUTS)
    pair.model.save_pretrained(tmp_path / "ours")
    pair.stock.save_pretrained(tmp_path / "stock")
    names = sorted(file.name for file in (tmp_path / "stock").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "ours").iterdir())
    assert filecmp.cmpfiles(tmp_path / "ours", tmp_path / "stock", names, shallow=False) == (names, [], [])


@heads
def test_state_and_structure_are_untouched(head):
    pair = Pair(head)
    assert list(pair.model.state_dict()) == list(pair.stock.state_dict())
    assert [n for n, _ in pair.model.named_modules()] == [n for n, _ in pair.stock.named_modules()]
    assert type(pair.model) is type(pair.stock)
    assert inspect.signature(pair.model.forward) == inspect.signature(pair.stock.forward)


def replicate(model):
    """`torch.nn.parallel.replicate` onto one replica, without the devices."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach() * 2)
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    return replicas[model]


@heads
def test_replicas_run_stock_on_their_own_tensors(head):
    pair = Pair(head)
    replica = replicate(pair.model)
    assert not any(OURS & module.__dict__.keys() for module in replica.modules())
    assert_equal(run(replica, **INPUTS), run(replicate(pair.stock), **INPUTS))
    pair.check_fast()


def test_data_parallel_on_the_cpu_is_fast():
    pair = Pair("token")
    with pair.fast(), torch.no_grad():
        torch.nn.DataParallel(pair.model)(**INPUTS)


def test_a_spawned_worker_gets_a_stock_model():
    pair = Pair()
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        ours, keys = pool.apply(_in_worker, (pair.model,))
    assert not OURS & set(keys)
    torch.testing.assert_close(ours, run(pair.stock, **INPUTS)["last_hidden_state"], rtol=1e-5, atol=1e-5)


def _in_worker(model):
    return run(model, **INPUTS)["last_hidden_state"], list(model.__dict__)


@heads
def test_the_model_is_freed_without_the_garbage_collector(head):
    model = make(head)
    encoder = weakref.ref(clinfast.optimize(model))
    run(model, **INPUTS)
    with pytest.warns(clinfast.ClinfastWarning):
        model(**INPUTS)
    forward = patch.find_patched(model)[0][2]
    watched = [weakref.ref(model), weakref.ref(forward), weakref.ref(forward.encoder), encoder]
    gc.collect()
    gc.disable()
    try:
        del model, forward
        assert [ref() for ref in watched] == [None] * len(watched)
    finally:
        gc.enable()


def test_a_kept_forward_of_a_freed_model_says_so():
    forward = clinfast.optimize(make()).forward
    gc.collect()
    with pytest.raises(ReferenceError, match="keep the model"):
        forward(**INPUTS)


def test_a_pickled_forward_is_the_stock_method():
    pair = Pair()
    method = pickle.loads(pickle.dumps(pair.model.forward))
    assert not isinstance(method, patch.PatchedForward)
    with torch.no_grad():
        assert_equal({"x": method(**INPUTS)[0]}, {"x": pair.stock(**INPUTS)[0]})


def test_restore_leaves_nothing():
    pair = Pair("sequence")
    clinfast.restore(pair.model)
    assert pair.model.__dict__.keys() == pair.stock.__dict__.keys()
    assert_stock(pair.model, pair.stock)
    clinfast.optimize(pair.model)
    pair.forward = pair.model.forward
    pair.check_fast()
