"""bind, unbind and finding units."""

import threading

import pytest
import torch
from bert_models import HEADS, assert_equal, make, run
from patched_models import INPUTS, Pair, close
from torch import nn
from transformers import BertForTokenClassification, BertLMHeadModel, BertModel

import clinfast
from clinfast import models, patch
from clinfast.engine.encoder import Encoder
from clinfast.engine.spec import Unsupported


class Tagger(nn.Module):
    """A user's own model around a base model."""

    def __init__(self):
        super().__init__()
        self.encoder = make()
        self.other = make(seed=1)
        self.again = self.encoder
        self.out = nn.Linear(64, 3)

    def forward(self, **inputs):
        a, b = self.encoder(**inputs).last_hidden_state, self.other(**inputs).last_hidden_state
        return {"logits": self.out(a + b)}


@pytest.mark.parametrize("head", [*HEADS, "choice"])
def test_the_outermost_known_module_is_found(head):
    assert [unit.path for unit in patch.find_units(make(head))] == [""]


def test_under_a_head_that_is_not_known_the_base_model_is_found():
    model = BertLMHeadModel(make().config)
    assert [unit.path for unit in patch.find_units(model)] == ["bert"]


def test_a_custom_module_and_two_encoders():
    tagger = Tagger().eval()
    assert [unit.path for unit in patch.find_units(tagger)] == ["encoder", "other"]
    stock = run(tagger, **INPUTS)
    clinfast.optimize(tagger)
    ours = run(tagger, **INPUTS)
    close(ours, stock, INPUTS["attention_mask"])
    assert [(path, f.calls_fast) for path, _, f in patch.find_patched(tagger)] == [("encoder", 1), ("other", 1)]


def test_one_of_two_encoders_is_refused():
    tagger = Tagger().eval()
    tagger.other.encoder.layer[0].output.dense = nn.Identity()
    served, refused = patch.find_units(tagger)
    assert served.refused is None and served.match is not None
    assert refused.path == "other" and refused.match is None
    assert "encoder.layer.0.output.dense is torch.nn.modules.linear.Identity" in refused.refused


def test_a_head_that_is_refused_gives_way_to_its_base_model():
    model = make("token")
    model.classifier = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    assert [(unit.path, unit.refused) for unit in patch.find_units(model)] == [("bert", None)]


def test_the_base_models_reason_surfaces():
    model = make("token")
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.SiLU()
    ((path, _, match, refused),) = patch.find_units(model)
    assert path == "bert" and match is None and "intermediate_act_fn is torch.nn.modules.activation.SiLU" in refused


def test_subclasses_are_not_taken():
    class Custom(BertModel):
        pass

    same_name = type("BertModel", (BertModel,), {"__module__": BertModel.__module__})
    for cls in (Custom, same_name):
        ((path, _, match, refused),) = patch.find_units(cls(make().config))
        assert path == "" and match is None
        assert f"its class {cls.__module__}.{cls.__qualname__} is derived from BertModel" in refused


def test_a_derived_head_gives_way_to_its_base_model():
    class Custom(BertForTokenClassification):
        pass

    assert [(unit.path, unit.refused) for unit in patch.find_units(Custom(make().config))] == [("bert", None)]


def test_what_is_not_a_model():
    with pytest.raises(TypeError, match=r"a builtins\.int cannot be optimized"):
        patch.find_units(3)


def bound(model):
    match = models.match(model)
    return patch.bind(model, match, Encoder(match))


def test_bind_and_unbind():
    model = make()
    before = dict(model.__dict__)
    assert patch.patched(model) is None and not patch.unbind(model)
    forward = bound(model)
    assert patch.patched(model) is forward is model.forward
    assert forward.match.head.name == "base" and forward.encoder.spec.num_layers == 2
    assert patch.unbind(model) and not patch.unbind(model)
    assert model.__dict__ == before


def test_binding_twice_is_refused():
    model = make()
    bound(model)
    with pytest.raises(ValueError, match="optimized already"):
        bound(model)


def test_a_foreign_forward_is_refused_by_name():
    model = make()
    model.forward = nn.Identity().forward
    match = models.match(model)
    with pytest.raises(Unsupported, match=r"builtins.method"):
        patch.bind(model, match, Encoder(match))


def test_a_deleted_forward_is_a_stock_model():
    pair = Pair()
    del pair.model.forward
    assert patch.patched(pair.model) is None
    assert_equal(run(pair.model, **INPUTS), run(pair.stock, **INPUTS))
    bound(pair.model)
    assert patch.patched(pair.model) is not None


def test_stock_forward():
    pair = Pair("token")
    with torch.no_grad():
        for model in (pair.model, pair.stock):
            ours = patch.stock_forward(model, **INPUTS).logits
            torch.testing.assert_close(ours, pair.stock(**INPUTS).logits, rtol=0, atol=0)
    assert (pair.forward.calls_fast, pair.forward.calls_stock) == (0, 0)


def test_an_encoder_optimized_inside_an_optimized_head():
    model = make("token")
    clinfast.optimize(model.bert)
    with pytest.raises(ValueError, match="optimized already"):
        clinfast.optimize(model)
    clinfast.restore(model)
    assert patch.find_patched(model) == []
    Pair(model=model).check_fast()


def test_restore_while_other_threads_call():
    pair = Pair()
    expected = run(pair.stock, **INPUTS)["last_hidden_state"]
    mask, failures = INPUTS["attention_mask"].bool(), []

    def call():
        for _ in range(20):
            got = run(pair.model, **INPUTS)["last_hidden_state"]
            if not torch.allclose(got[mask], expected[mask], rtol=1e-4, atol=1e-4):
                failures.append(got)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        clinfast.restore(pair.model)
        clinfast.optimize(pair.model)
    for thread in threads:
        thread.join()
    assert not failures
