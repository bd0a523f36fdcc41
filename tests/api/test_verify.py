"""`verify` passes on what is right and fails on what is not; `report` tells what happened."""

import copy

import pytest
import torch
from bert_models import ids, make, mapped, right_padded, run
from transformers import BatchEncoding

import clinfast
from clinfast import patch
from clinfast.engine.encoder import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = ["base", "no-pooler", "sequence", "token", "qa", "mlm"]


def batch(seed=0):
    return {"input_ids": ids(4, 24, seed=seed), "attention_mask": right_padded([24, 3, 11, 17])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_passes_on_a_good_model(head, dtype):
    model = clinfast.optimize(make(head, dtype=dtype))
    result = clinfast.verify(model, [batch(0), batch(1), batch(2)])
    assert result and result.passed and result.batches == 3 and not result.fallbacks
    assert 0 < result.ours_error < (1e-4 if dtype is torch.float32 else 1)
    assert 0 < result.stock_error < (1e-4 if dtype is torch.float32 else 1)
    assert result.cosine > (0.99999 if dtype is torch.float32 else 0.9)
    assert (result.label_agreement is not None) == (head not in ("base", "no-pooler"))
    if dtype is torch.float32 and result.label_agreement is not None:
        assert result.label_agreement == 1.0
    text = str(result)
    assert "passed over 3 batches" in text and ("labels that agree" in text) == (result.label_agreement is not None)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_passes_where_the_precision_is_not_the_models_own(dtype, precision):
    model = clinfast.optimize(make("token", dtype=dtype), precision=precision)
    result = clinfast.verify(model, [batch(0), batch(1)])
    assert result, result


def shift(monkeypatch, by, where=...):
    clean = Encoder.run

    def run(self, request):
        return mapped(clean(self, request), by)

    monkeypatch.setattr(Encoder, "run", run)


def one_row(x):
    x = x.clone()
    x[2, 1] += 1e-2
    return x


BREAKAGES = {
    "added": lambda x: x + 1e-2,
    "scaled": lambda x: x * 1.01,
    "one-token": one_row,
    "nan": lambda x: x * float("nan"),
    "inf": lambda x: x + float("inf"),
    "one-nan": lambda x: torch.where(x == x.max(), float("nan"), x),
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("tolerance", [None, 1e-3])
@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("head", ["base", "sequence", "token", "qa"])
def test_fails_on_a_broken_model(head, breakage, tolerance, monkeypatch):
    model = clinfast.optimize(make(head))
    shift(monkeypatch, BREAKAGES[breakage])
    result = clinfast.verify(model, batch(), tolerance=tolerance)
    assert not result and not result.passed and "FAILED" in str(result)


def test_labels_that_flip_are_counted(monkeypatch):
    model = clinfast.optimize(make("sequence", num_labels=3))
    shift(monkeypatch, lambda x: -x)
    result = clinfast.verify(model, batch())
    assert result.label_agreement == 0.0 and result.cosine < -0.99


def test_tolerance_is_a_largest_difference(monkeypatch):
    model = clinfast.optimize(make())
    shift(monkeypatch, lambda x: x + 1e-2)
    assert not clinfast.verify(model, batch())
    assert not clinfast.verify(model, batch(), tolerance=0.9e-2)
    result = clinfast.verify(model, batch(), tolerance=1.1e-2)
    assert result and abs(result.max_difference - 1e-2) < 1e-4 and "0.011" in str(result)


def test_a_missing_output_is_an_error(monkeypatch):
    model = clinfast.optimize(make())
    clean = Encoder.run
    monkeypatch.setattr(Encoder, "run", lambda self, request: clean(self, request)._replace(branches=()))
    with pytest.raises(RuntimeError, match="pooler_output"):
        clinfast.verify(model, batch())


def test_fallbacks_are_told():
    model = clinfast.optimize(make())
    left = {**batch(), "attention_mask": torch.flip(batch()["attention_mask"], [1])}
    with pytest.warns(clinfast.ClinfastWarning, match="left padding"):
        result = clinfast.verify(model, [left, batch(), left])
    ((reason, count),) = result.fallbacks.items()
    assert count == 2 and "left padding" in reason and f"2 x stock: {reason}" in str(result)


def test_twice_and_the_name_stays_a_function():
    model = clinfast.optimize(make())
    for _ in range(3):
        assert clinfast.verify(model, batch())
        assert callable(clinfast.verify) and callable(clinfast.report)


def test_leaves_the_model_as_it_was():
    model = clinfast.optimize(make("sequence")).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert clinfast.verify(model, batch())
    assert model.training and patch.patched(model) is not None
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    clinfast.restore(model)


def test_batch_encoding_and_labels():
    model = clinfast.optimize(make("sequence"))
    assert clinfast.verify(model, BatchEncoding(batch()))
    with pytest.warns(clinfast.ClinfastWarning, match="labels"):
        result = clinfast.verify(model, {**batch(), "labels": torch.tensor([0, 1, 1, 0])})
    assert sum(result.fallbacks.values()) == 1


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ("some text", TypeError, "str"),
        (["some text"], TypeError, "str"),
        (None, TypeError, "NoneType"),
        (torch.zeros(2, 3, dtype=torch.long), TypeError, "Tensor"),
        ([], ValueError, "empty"),
        ({"input_ids": [[1, 2]]}, TypeError, "return_tensors='pt'"),
    ],
    ids=["str", "strings", "none", "tensor", "empty", "lists"],
)
def test_wrong_inputs(inputs, error, words):
    model = clinfast.optimize(make())
    with pytest.raises(error, match=words):
        clinfast.verify(model, inputs)


def test_several_encoders_are_verified_one_by_one():
    both = torch.nn.ModuleList([make(), make(seed=1)])
    clinfast.optimize(both)
    with pytest.raises(ValueError, match="2 optimized encoders"):
        clinfast.verify(both, batch())
    assert clinfast.verify(both[1], batch())


def test_report_of_an_optimized_model():
    model = clinfast.optimize(make("sequence"))
    for _ in range(3):
        run(model, **batch())
    assert clinfast.report(model).units[0].facts["packed_bytes"] > 0
    with pytest.warns(clinfast.ClinfastWarning):
        model(**batch())
    report = clinfast.report(model)
    assert (report.calls_fast, report.calls_stock) == (3, 1)
    (unit,) = report.units
    assert unit.path == "" and unit.class_name == "BertForSequenceClassification" and unit.refused is None
    assert unit.facts["family"] == "bert" and unit.facts["head"] == "sequence_classification"
    assert unit.facts["packed_bytes"] == 0, "a call in grad mode drops the packed weights"
    assert report.kernel_calls["pack[cpu]"] > 0
    ((reason, count),) = report.fallbacks.items()
    text = str(report)
    assert text.startswith("clinfast: 3 fast calls, 1 stock calls")
    for part in ("BertForSequenceClassification", "bert, 2 layers of 64", "float32", "padding remove", "proved on"):
        assert part in text
    assert f"{count} x stock: {reason}" in text and "gradients" in reason
    assert all(len(line) < 200 for line in text.splitlines())


def test_report_is_a_snapshot_and_begins_anew_after_restore():
    model = clinfast.optimize(make())
    run(model, **batch())
    first = clinfast.report(model)
    run(model, **batch())
    assert first.calls_fast == 1 and clinfast.report(model).calls_fast == 2
    clinfast.optimize(clinfast.restore(model))
    assert clinfast.report(model).calls_fast == 0


def test_report_names_the_place_of_an_inner_encoder():
    model = clinfast.optimize(torch.nn.ModuleDict({"bert": make()}))
    assert clinfast.report(model).units[0].path == "bert" and "BertModel (bert)" in str(clinfast.report(model))


def test_report_of_a_stock_model():
    report = clinfast.report(make())
    assert not report.units and report.calls_fast == 0 and "nothing" in str(report)


def test_copies_are_stock_and_not_in_the_report():
    model = clinfast.optimize(make())
    assert not clinfast.report(copy.deepcopy(model)).units
