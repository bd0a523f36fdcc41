"""Changes below the patched forward are seen: nothing is computed that the modules no longer say."""

import copy

import pytest
import torch
import transformers
from bert_models import assert_equal, make, run
from patched_models import INPUTS, Pair
from torch import nn
from torch.nn.utils import parametrize, prune

import clinfast
from clinfast.engine.spec import Unsupported

pytestmark = pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning")


def layer(model, i=0):
    return getattr(model, "bert", model).encoder.layer[i]


def query(model):
    return layer(model).attention.self.query


def assert_stock_of(pair, reason):
    """A stock call that equals a fresh copy of the changed model, which no patch has touched."""
    with pair.falls_back(reason):
        ours = run(pair.model, **INPUTS)
    assert_equal(ours, run(copy.deepcopy(pair.model), **INPUTS))


class TestHooks:
    @pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
    @pytest.mark.parametrize("path", ["encoder.layer.1", "embeddings.dropout", "encoder.layer.0.attention.self.key"])
    def test_a_submodules_hook_fires(self, register, path):
        pair, calls = Pair(), []
        pair.check_fast()
        handle = getattr(pair.model.get_submodule(path), register)(lambda *_: calls.append(1))
        with pair.falls_back(f"{path} has a forward hook"):
            run(pair.model, **INPUTS)
        assert calls == [1]
        handle.remove()
        pair.check_fast()

    def test_hooks_on_the_model_itself_fire_on_the_fast_path(self):
        pair, calls = Pair(), []
        pair.model.register_forward_pre_hook(lambda *_: calls.append("before"))
        pair.model.register_forward_hook(lambda *_: calls.append("after"))
        pair.check_fast()
        assert calls == ["before", "after"]

    def test_a_hook_on_the_base_model_of_a_head(self):
        pair, calls = Pair("token"), []
        pair.model.bert.register_forward_hook(lambda *_: calls.append(1))
        with pair.falls_back("bert has a forward hook"):
            run(pair.model, **INPUTS)
        assert calls == [1]

    def test_hooks_there_before_optimize(self):
        model, calls = make(), []
        handle = layer(model).register_forward_hook(lambda *_: calls.append(1))
        pair = Pair(model=model)
        calls.clear()
        run(pair.model, **INPUTS)
        assert calls == [1]
        handle.remove()
        pair.check_fast()

    def test_a_hook_dict_that_is_swapped_out_and_in(self):
        pair, calls = Pair(), []
        module = layer(pair.model)
        module.register_forward_hook(lambda *_: calls.append(1))
        run(pair.model, **INPUTS)
        kept, module._forward_hooks = module._forward_hooks, type(module._forward_hooks)()
        pair.check_fast()
        module._forward_hooks = kept
        calls.clear()
        run(pair.model, **INPUTS)
        assert calls == [1]

    def test_a_hook_in_a_new_hook_dict(self):
        pair, calls = Pair(), []
        pair.check_fast()
        for module in pair.model.modules():
            module._forward_hooks = type(module._forward_hooks)()
        layer(pair.model).register_forward_hook(lambda *_: calls.append(1))
        run(pair.model, **INPUTS)
        assert calls == [1]

    def test_a_hook_beside_those_of_transformers(self):
        pair, calls = Pair(), []
        run(pair.model, **INPUTS, output_hidden_states=True)
        pair.check_fast()
        handle = layer(pair.model).register_forward_hook(lambda *_: calls.append(1))
        with pair.falls_back("encoder.layer.0 has a forward hook"):
            run(pair.model, **INPUTS)
        assert calls == [1]
        handle.remove()
        pair.check_fast()

    def test_a_global_hook_fires(self):
        pair, calls = Pair(), []
        handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
        try:
            with pair.falls_back("a global module hook is registered"):
                run(pair.model, **INPUTS)
        finally:
            handle.remove()
        assert len(calls) > 20
        pair.check_fast()

    def test_a_hook_elsewhere_in_the_process_is_no_reason(self):
        pair = Pair()
        nn.Linear(2, 2).register_forward_hook(lambda *_: None)
        pair.check_fast()


class TestSwaps:
    def test_a_layer(self):
        pair = Pair()
        pair.model.encoder.layer[1] = copy.deepcopy(make(seed=5).encoder.layer[0])
        assert_stock_of(pair, "a submodule of encoder.layer was replaced after optimize()")

    def test_truncation(self):
        pair = Pair()
        pair.model.encoder.layer = pair.model.encoder.layer[:1]
        assert_stock_of(pair, "a submodule of encoder was replaced after optimize()")

    def test_a_deleted_layer(self):
        pair = Pair()
        del pair.model.encoder.layer[0]
        assert_stock_of(pair, "a submodule of encoder.layer was replaced after optimize()")

    def test_a_linear(self):
        pair = Pair()
        layer(pair.model).attention.self.query = nn.Linear(64, 64)
        assert_stock_of(pair, "a submodule of encoder.layer.0.attention.self was replaced after optimize()")

    def test_the_activation(self):
        pair = Pair()
        layer(pair.model).intermediate.intermediate_act_fn = nn.ReLU()
        assert_stock_of(pair, "a submodule of encoder.layer.0.intermediate was replaced after optimize()")

    def test_the_pooler(self):
        pair = Pair("sequence")
        pair.model.bert.pooler.activation = nn.Sigmoid()
        assert_stock_of(pair, "a submodule of bert.pooler was replaced after optimize()")

    def test_the_classifier(self):
        pair = Pair("token")
        pair.model.classifier = nn.Linear(64, 5)
        assert_stock_of(pair, "a submodule of the model was replaced after optimize()")

    def test_put_back_is_fast_again(self):
        pair = Pair()
        kept = layer(pair.model).attention.self.query
        layer(pair.model).attention.self.query = nn.Linear(64, 64)
        run(pair.model, **INPUTS)
        layer(pair.model).attention.self.query = kept
        pair.check_fast()

    def test_optimize_again(self):
        pair = Pair()
        pair.model.encoder.layer = pair.model.encoder.layer[:1]
        run(pair.model, **INPUTS)
        Pair(model=clinfast.restore(pair.model)).check_fast()


class TestForwards:
    def test_an_instance_forward_on_a_submodule(self):
        pair, calls = Pair(), []
        module = layer(pair.model).output
        stock = module.forward
        module.forward = lambda *a, **k: calls.append(1) or stock(*a, **k)
        with pair.falls_back("encoder.layer.0.output has a forward of its own"):
            run(pair.model, **INPUTS)
        assert calls == [1]
        del module.forward
        pair.check_fast()

    def test_a_bound_method_of_its_own_is_none(self):
        pair = Pair()
        module = layer(pair.model).output
        module.forward = module.forward
        pair.check_fast()
        module.forward = layer(pair.model, 1).output.forward
        with pair.falls_back("encoder.layer.0.output has a forward of its own"):
            run(pair.model, **INPUTS)

    def test_a_class_of_a_submodule_is_patched(self, monkeypatch):
        pair = Pair()
        monkeypatch.setattr(type(layer(pair.model).output), "forward", lambda self, x, residual: residual)
        with pair.falls_back("BertOutput.forward was replaced after optimize()"):
            ours = run(pair.model, **INPUTS)
        assert_equal(ours, run(pair.stock, **INPUTS))

    def test_the_models_own_class_is_patched(self, monkeypatch):
        pair = Pair()
        monkeypatch.setattr(type(pair.model), "forward", lambda self, input_ids: {"x": input_ids})
        with pair.falls_back("the model's class or its forward was changed after optimize()"):
            run(pair.model, input_ids=INPUTS["input_ids"])

    def test_a_submodule_of_another_class(self):
        class Other(nn.Linear):
            def forward(self, x):
                return super().forward(x) * 2

        pair = Pair()
        query(pair.model).__class__ = Other
        assert_stock_of(pair, "encoder.layer.0.attention.self.query changed its class after optimize()")


class TestConstants:
    @pytest.mark.parametrize(
        ("path", "name", "value"),
        [
            ("embeddings.LayerNorm", "eps", 0.5),
            ("encoder.layer.1.output.LayerNorm", "eps", 0.5),
            ("encoder.layer.0.attention.self", "scaling", 1.0),
            ("encoder.layer.0.attention.self", "is_causal", True),
        ],
    )
    def test_an_edit_is_seen(self, path, name, value):
        pair = Pair()
        module = pair.model.get_submodule(path)
        if not hasattr(module, name):
            pytest.skip(f"transformers {transformers.__version__} has no {path}.{name}")
        before = getattr(module, name)
        setattr(module, name, value)
        assert_stock_of(pair, f"{path}.{name} was changed after optimize()")
        setattr(module, name, before)
        pair.check_fast()


class TestParameters:
    def test_another_parameter_of_the_same_shape_is_fast(self):
        pair = Pair()
        for model in (pair.model, pair.stock):
            weight = query(model).weight
            query(model).weight = nn.Parameter(weight.detach() * -1)
        pair.check_fast()

    def test_assigned_state_is_fast(self):
        pair, other = Pair(), make(seed=3)
        pair.model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
        pair.stock.load_state_dict(other.state_dict())
        pair.check_fast()

    def test_another_shape_runs_stock(self):
        pair = Pair("token")
        pair.model.classifier.weight = nn.Parameter(torch.ones(5, 64))
        pair.model.classifier.bias = nn.Parameter(torch.ones(5))
        assert_stock_of(pair, "classifier.weight changed its shape after optimize()")

    @pytest.mark.parametrize("rows", [50, 120])
    def test_resized_embeddings_run_stock(self, rows):
        pair = Pair()
        pair.model.resize_token_embeddings(rows, mean_resizing=False)
        inputs = {"input_ids": INPUTS["input_ids"] % rows}
        with pair.falls_back("an embedding table was resized after optimize()"):
            ours = run(pair.model, **inputs)
        assert_equal(ours, run(copy.deepcopy(pair.model), **inputs))

    def test_not_quite_a_parameter(self):
        class Quantized(nn.Parameter):
            pass

        pair = Pair()
        weight = query(pair.model).weight.detach().clone()
        query(pair.model)._parameters["weight"] = weight.as_subclass(Quantized)
        reason = "encoder.layer.0.attention.self.query.weight is a Quantized, not an nn.Parameter"
        with pair.falls_back(reason):
            run(pair.model, **INPUTS)

    def test_pruning(self):
        pair = Pair()
        prune.l1_unstructured(query(pair.model), "weight", amount=0.5)
        assert_stock_of(pair, "parameters of encoder.layer.0.attention.self.query were added or removed")
        prune.remove(query(pair.model), "weight")
        pair.stock = copy.deepcopy(pair.model)
        assert not any(m._forward_pre_hooks for m in pair.model.modules())
        pair.check_fast()

    def test_a_pruned_embedding(self):
        pair = Pair()
        prune.l1_unstructured(pair.model.embeddings.word_embeddings, "weight", amount=0.5)
        prune.l1_unstructured(pair.stock.embeddings.word_embeddings, "weight", amount=0.5)
        pair.check_stock("parameters of embeddings.word_embeddings were added or removed")

    def test_parametrization(self):
        class Double(nn.Module):
            def forward(self, x):
                return 2 * x

        pair = Pair()
        parametrize.register_parametrization(query(pair.model), "weight", Double())
        with pair.falls_back("encoder.layer.0.attention.self.query changed its class after optimize()"):
            ours = run(pair.model, **INPUTS)
        parametrize.register_parametrization(query(pair.stock), "weight", Double())
        assert_equal(ours, run(pair.stock, **INPUTS))

    def test_dynamic_quantization(self):
        pair = Pair()
        quantized = torch.ao.quantization.quantize_dynamic(pair.model, {nn.Linear})
        expected = torch.ao.quantization.quantize_dynamic(pair.stock, {nn.Linear})
        assert_equal(run(quantized, **INPUTS), run(expected, **INPUTS))
        pair.check_fast(**INPUTS)
        with pytest.warns(clinfast.ClinfastWarning, match=r"query.* is torch\.ao\.nn"):
            clinfast.optimize(quantized)


class TestRefusedAtOptimize:
    """What is there before `optimize` is refused by the name of the submodule."""

    def refusal(self, model):
        with pytest.raises(Unsupported) as caught:
            clinfast.optimize(model, strict=True)
        return str(caught.value)

    def test_pruned(self):
        model = make()
        prune.l1_unstructured(query(model), "weight", amount=0.5)
        assert "encoder.layer.0.attention.self.query.weight is not a parameter" in self.refusal(model)

    def test_parametrized(self):
        model = make()
        parametrize.register_parametrization(query(model), "weight", nn.Identity())
        text = self.refusal(model)
        assert "encoder.layer.0.attention.self.query is" in text and "remove_parametrizations" in text

    def test_quantized(self):
        model = torch.ao.quantization.quantize_dynamic(make(), {nn.Linear})
        assert "encoder.layer.0.attention.self.query is torch.ao" in self.refusal(model)

    def test_on_the_meta_device(self):
        assert "embeddings.word_embeddings.weight is on the meta device" in self.refusal(make().to("meta"))

    def test_of_two_dtypes(self):
        model = make()
        layer(model, 1).output.dense.half()
        assert "encoder.layer.1.output.dense.weight has dtype torch.float16" in self.refusal(model)

    def test_a_submodule_with_a_forward_of_its_own(self):
        model = make()
        query(model).forward = lambda x: x
        assert "encoder.layer.0.attention.self.query has a forward of its own" in self.refusal(model)

    def test_the_model_with_a_forward_of_its_own(self):
        model = make()
        model.forward = lambda **k: None
        assert "already has a forward of its own" in self.refusal(model)

    def test_a_wrong_position_buffer(self):
        model = make()
        model.embeddings.position_ids[0, 3] = 0
        assert "embeddings.position_ids" in self.refusal(model)


class TestWeightsAfterTraining:
    """Fused optimizers bump no version: a call in training or grad mode makes the next fast call pack anew."""

    @pytest.mark.parametrize("train", [True, False])
    def test_a_fused_step_is_seen(self, train):
        pair = Pair("token")
        pair.check_fast()
        for model in (pair.model, pair.stock):
            torch.manual_seed(1)
            model.train(train)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            # One row of one table, which sampling a few values cannot see.
            optimizer = torch.optim.SGD([model.bert.embeddings.token_type_embeddings.weight], lr=50.0, fused=True)
            model(**INPUTS).logits.square().sum().backward()
            optimizer.step()
            model.eval()
        pair.check_fast()

    def test_the_dtype_follows(self):
        pair = Pair()
        pair.model.to(torch.bfloat16)
        with pair.fast():
            out = run(pair.model, **INPUTS)
        assert out["last_hidden_state"].dtype is torch.bfloat16

    def test_a_dtype_that_is_not_served_runs_stock(self):
        pair = Pair()
        pair.model.half()
        pair.stock.half()
        ours = run(pair.model, **INPUTS)
        assert_equal(ours, run(pair.stock, **INPUTS))
        assert pair.forward.calls_stock == 1
