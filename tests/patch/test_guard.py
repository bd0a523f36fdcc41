"""What the guard has not been taught runs stock, with the reason, and stock's own answer."""

import inspect
import threading
import warnings

import pytest
import torch
from bert_models import assert_equal, ids, make, right_padded, run
from patched_models import INPUTS, Pair, close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_version import FOUR, needs_five

import clinfast

pytestmark = pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning")

IDS, MASK = INPUTS["input_ids"], INPUTS["attention_mask"]
TYPES = torch.zeros_like(IDS)


@pytest.fixture(params=["base", "sequence", "token", "qa"])
def pair(request):
    return Pair(request.param)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.int32, torch.int8, torch.uint8])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
def test_integer_and_bool_inputs_are_fast(pair, mask_dtype, id_dtype):
    pair.check_fast(input_ids=IDS.to(id_dtype), attention_mask=MASK.to(mask_dtype), token_type_ids=TYPES.to(id_dtype))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"attention_mask": None, "token_type_ids": None, "position_ids": None, "inputs_embeds": None},
        {"output_attentions": False, "output_hidden_states": False, "return_dict": True},
        pytest.param({"labels": None, "head_mask": None, "past_key_values": None}, marks=needs_five),
    ],
    ids=["ids only", "absent as None", "defaults spelled out", "more None"],
)
def test_none_and_defaults_are_fast(pair, given):
    pair.check_fast(input_ids=IDS, **given)


def test_positional_inputs(pair):
    with pair.fast(), torch.no_grad():
        ours = pair.model(IDS, MASK, TYPES).to_tuple()
    with torch.no_grad():
        stock = pair.stock(IDS, MASK, TYPES).to_tuple()
    close({"0": ours[0]}, {"0": stock[0]}, MASK)


UNTAUGHT = {
    "position_ids": (torch.arange(9).flip(0)[None], "the argument position_ids"),
    "output_attentions": (True, "the argument output_attentions"),
    "output_hidden_states": (True, "the argument output_hidden_states"),
    "is_causal": (True, "the argument is_causal"),
    "past_key_values": ((), "the argument past_key_values"),
    "use_cache": (True, "the argument use_cache"),
    "something_else": (1, "an argument that the fast path does not serve"),
}


@pytest.mark.parametrize("name", UNTAUGHT)
def test_arguments_run_stock(pair, name):
    value, reason = UNTAUGHT[name]
    if FOUR and name not in inspect.signature(pair.stock.forward).parameters:
        with pytest.raises(TypeError, match=name):
            run(pair.model, **INPUTS, **{name: value})
        pair.check_fast()
        return
    if name == "past_key_values":
        if FOUR:
            pytest.skip("before transformers 5 the cache of an encoder is tuples, made by itself")
        value = __import__("transformers").DynamicCache()
    if name == "output_hidden_states":
        run(pair.stock, **INPUTS, output_hidden_states=True)
    with pair.falls_back(reason), torch.no_grad():
        ours = pair.model(**INPUTS, **{name: value})
    if name != "past_key_values":
        with torch.no_grad():
            stock = pair.stock(**INPUTS, **{name: value})
        assert ours.keys() == stock.keys()
        torch.testing.assert_close(ours[0], stock[0], rtol=0, atol=0)
    pair.check_fast()


def test_output_hidden_states_are_there_and_leave_the_fast_path_open():
    pair = Pair("sequence")
    with torch.no_grad():
        out = pair.model(**INPUTS, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    hooks = [m for m in pair.model.modules() if m._forward_hooks]
    assert hooks or FOUR, "transformers installs its hooks for good; the test is about those"
    pair.check_fast()


@pytest.mark.parametrize("head", ["base", "sequence", "token"])
def test_return_dict_false_gives_a_tuple(head):
    pair = Pair(head)
    with pair.falls_back("the argument return_dict"), torch.no_grad():
        assert type(pair.model(**INPUTS, return_dict=False)) is tuple


def test_labels_give_a_loss():
    pair = Pair("token")
    with pair.falls_back("the argument labels"), torch.no_grad():
        assert pair.model(**INPUTS, labels=torch.zeros_like(IDS)).loss is not None


def test_inputs_embeds_run_stock():
    pair = Pair()
    embeds = pair.model.embeddings.word_embeddings(IDS).detach()
    pair.check_stock("the argument inputs_embeds", inputs_embeds=embeds, attention_mask=MASK)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("output_hidden_states", True, "config.output_hidden_states is set"),
        ("return_dict", False, "config.return_dict is False"),
        ("is_causal", True, "config.is_causal is set"),
        ("is_decoder", True, "config.is_decoder is set"),
    ],
)
def test_the_config_is_read_at_every_call(field, value, reason):
    pair = Pair()
    before = getattr(pair.model.config, field, None)
    pair.check_fast()
    setattr(pair.model.config, field, value)
    with pair.falls_back(reason), torch.no_grad():
        pair.model(**INPUTS)
    setattr(pair.model.config, field, before)
    pair.check_fast()


def test_output_attentions_by_config():
    pair = Pair(model=make(attn_implementation="eager"))
    pair.model.config.output_attentions = True
    with pair.falls_back("config.output_attentions is set"), torch.no_grad():
        assert len(pair.model(**INPUTS).attentions) == 2


def test_another_config_object_is_seen():
    pair = Pair()
    other = type(pair.model.config)(**{**pair.model.config.to_dict(), "is_decoder": True})
    other._attn_implementation = "sdpa"
    pair.model.config = other
    with pair.falls_back("config.is_decoder is set"), torch.no_grad():
        pair.model(**INPUTS)


def test_a_config_of_an_inner_module_is_seen():
    pair = Pair("sequence")
    inner = type(pair.model.config)(**pair.model.config.to_dict())
    inner._attn_implementation, inner.is_decoder = "sdpa", True
    pair.model.bert.config = inner
    with pair.falls_back("bert.config was changed after optimize()"), torch.no_grad():
        pair.model(**INPUTS)


@needs_five
def test_ones_own_attention_runs_stock():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def zeros(module, query, key, value, attention_mask, **kwargs):
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    AttentionInterface.register("zeros_for_test", zeros)
    AttentionMaskInterface.register("zeros_for_test", sdpa_mask)
    pair = Pair()
    for model in (pair.model, pair.stock):
        model.set_attn_implementation("zeros_for_test")
    pair.check_stock("config._attn_implementation is 'zeros_for_test'")
    for name in ("eager", "sdpa"):
        pair.model.set_attn_implementation(name)
        pair.stock.set_attn_implementation(name)
        pair.check_fast()


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (MASK.float(), "the dtype of attention_mask"),
        (MASK[:, None, None, :].bool(), "attention_mask does not have the shape of input_ids"),
        (torch.ones(3, 10, dtype=torch.long), "attention_mask does not have the shape of input_ids"),
        (torch.ones(9, dtype=torch.long), "attention_mask does not have the shape of input_ids"),
    ],
    ids=["float", "4-D", "wide but full", "1-D but full"],
)
def test_masks_that_stock_takes_but_the_fast_path_does_not(pair, mask, reason):
    try:
        run(pair.stock, input_ids=IDS, attention_mask=mask)
    except Exception as error:
        assert FOUR, error
        with pytest.raises(type(error), match="attention_mask has shape"):
            run(pair.model, input_ids=IDS, attention_mask=mask)
        return
    pair.check_stock(reason, input_ids=IDS, attention_mask=mask)


def test_token_types_that_broadcast():
    pair = Pair()
    pair.check_stock(
        "token_type_ids does not have the shape of input_ids",
        input_ids=IDS,
        token_type_ids=torch.ones(1, 9, dtype=torch.long),
    )


def test_a_tensor_subclass_runs_stock():
    class Tagged(torch.Tensor):
        pass

    pair = Pair()
    with pair.falls_back("input_ids is not a plain tensor"), torch.no_grad():
        pair.model(input_ids=IDS.as_subclass(Tagged))


def test_left_padding_runs_stock_where_column_zero_is_read():
    mask = right_padded([9, 5, 2]).flip(1)
    pair = Pair("sequence")
    with torch.no_grad():
        ours, stock = pair.model(IDS, mask).logits, pair.stock(IDS, mask).logits
    torch.testing.assert_close(ours, stock, rtol=0, atol=0)
    assert pair.forward.calls_stock == 1


def test_grad_mode_runs_stock_and_gives_gradients(pair):
    with pair.falls_back("gradients are on and the model's parameters require them"):
        out = pair.model(**INPUTS)
    out[0].sum().backward()
    assert pair.model.get_parameter(next(n for n, _ in pair.model.named_parameters())).grad is not None


def test_a_frozen_model_is_fast_in_grad_mode():
    pair = Pair(model=make("token").requires_grad_(False))
    with pair.fast():
        out = pair.model(**INPUTS)
    assert not out.logits.requires_grad
    pair.model.classifier.bias.requires_grad_(True)
    with pair.falls_back("gradients are on and the model's parameters require them"):
        assert pair.model(**INPUTS).logits.requires_grad


def test_inference_only_needs_no_no_grad():
    pair = Pair(inference_only=True)
    with pair.fast():
        assert not pair.model(**INPUTS)[0].requires_grad
    pair.model.train()
    with pair.falls_back("the model is in training mode"):
        pair.model(**INPUTS)


def test_inference_mode_is_fast(pair):
    with pair.fast(), torch.inference_mode():
        pair.model(**INPUTS)


def test_grad_mode_is_per_thread():
    pair = Pair()
    with torch.no_grad():
        thread = threading.Thread(target=lambda: pair.model(**INPUTS))
        thread.start()
        thread.join()
    assert pair.forward.fallbacks == {"gradients are on and the model's parameters require them": 1}


def test_training_mode_runs_stock(pair):
    pair.model.train()
    with pair.falls_back("the model is in training mode" if pair.model.training else ""), torch.no_grad():
        pair.model(**INPUTS)
    pair.model.eval()
    pair.check_fast()


def test_dropout_left_on_runs_stock(pair):
    for module in pair.model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    with torch.no_grad():
        first, second = pair.model(**INPUTS)[0], pair.model(**INPUTS)[0]
    assert not torch.equal(first, second), "Monte Carlo dropout has to stay random"
    assert pair.forward.calls_fast == 0
    assert all(reason.endswith("is in training mode") for reason in pair.forward.fallbacks)
    pair.model.eval()
    pair.check_fast()


def test_attention_dropout_alone_is_seen():
    pair = Pair()
    pair.model.encoder.layer[1].attention.self.train()
    with pair.falls_back("encoder.layer.1.attention.self is in training mode"), torch.no_grad():
        pair.model(**INPUTS)


def test_autocast_runs_stock(pair):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pair.check_stock("autocast is on")
    with torch.autocast("cpu", enabled=False):
        pair.check_fast()


def test_a_dispatch_mode_sees_every_op():
    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.seen += 1
            return func(*args, **(kwargs or {}))

    pair = Pair()
    with Count():
        pair.check_stock("a torch dispatch or function mode is active")
    assert Count.seen > 20


def test_a_default_device_is_no_reason():
    pair = Pair()
    with torch.device("cpu"):
        pair.check_fast()


def test_functional_call_runs_stock_with_the_given_weights():
    pair = Pair()
    other = {name: value.detach() * 0.5 for name, value in pair.model.named_parameters()}
    with torch.no_grad():
        ours = torch.func.functional_call(pair.model, other, args=(), kwargs=INPUTS)
        stock = torch.func.functional_call(pair.stock, other, args=(), kwargs=INPUTS)
    assert_equal({"x": ours[0]}, {"x": stock[0]})
    assert pair.forward.calls_fast == 0
    pair.check_fast()


@needs_five
def test_vmap_runs_stock():
    pair = Pair()
    with torch.no_grad(), pair.falls_back("a torch.func transform is active"):
        torch.func.vmap(lambda x: pair.model(x[None])[0][0])(IDS)


def test_the_environment_switches_off(pair, monkeypatch):
    monkeypatch.setenv("CLINFAST_DISABLE", "1")
    pair.check_stock("CLINFAST_DISABLE is set")
    monkeypatch.setenv("CLINFAST_DISABLE", "0")
    pair.check_fast()


def test_disabled_is_per_thread(pair):
    with clinfast.disabled(pair.model):
        pair.check_stock("inside disabled(model)")
        with clinfast.disabled(pair.model):
            pair.check_stock("inside disabled(model)")
        thread = threading.Thread(target=pair.check_fast)
        thread.start()
        thread.join()
        pair.check_stock("inside disabled(model)")
    pair.check_fast()


class TestStrict:
    def test_raises_with_the_reason_and_what_to_do(self):
        pair = Pair(strict=True)
        pair.check_fast()
        with pytest.raises(clinfast.StrictError, match=r"gradients are on.*inference_mode"):
            pair.model(**INPUTS)
        with torch.no_grad(), pytest.raises(clinfast.StrictError, match="output_attentions"):
            pair.model(**INPUTS, output_attentions=True)
        pair.model.train()
        with pytest.raises(clinfast.StrictError, match="training mode"):
            pair.model(**INPUTS)
        assert isinstance(clinfast.StrictError("x"), RuntimeError)

    def test_values_are_covered_too(self):
        pair = Pair("sequence", strict=True)
        with torch.no_grad(), pytest.raises(clinfast.StrictError, match="column 0"):
            pair.model(IDS, right_padded([9, 5, 2]).flip(1))

    def test_switching_off_is_not_a_failure(self, monkeypatch):
        pair = Pair(strict=True)
        with clinfast.disabled(pair.model):
            pair.check_stock("inside disabled(model)")
        monkeypatch.setenv("CLINFAST_DISABLE", "1")
        pair.check_stock("CLINFAST_DISABLE is set")

    def test_bad_input_keeps_stocks_error_class(self):
        pair = Pair(strict=True)
        with torch.no_grad(), pytest.raises((ValueError, IndexError), match=r"shape \[9\]"):
            pair.model(IDS[0])

    def test_odd_input_that_stock_takes_is_refused(self):
        pair = Pair(strict=True)
        with torch.no_grad(), pytest.raises(clinfast.StrictError, match=r"attention_mask has shape \[3, 10\]"):
            pair.model(IDS, torch.ones(3, 10, dtype=torch.long))


@pytest.mark.filterwarnings("always::clinfast.ClinfastWarning")
class TestWarnings:
    def test_once_a_reason_and_model(self):
        pairs = Pair(), Pair()
        for pair in pairs:
            with pytest.warns(clinfast.ClinfastWarning, match=r"gradients are on.*no_grad") as caught:
                for _ in range(3):
                    pair.model(**INPUTS)
            assert len(caught) == 1
            assert caught[0].filename == __file__
            with pytest.warns(clinfast.ClinfastWarning, match="output_attentions"), torch.no_grad():
                pair.model(**INPUTS, output_attentions=True)

    def test_one_of_many_threads_warns(self):
        pair = Pair()
        start = threading.Barrier(8)

        def call():
            start.wait()
            pair.model(**INPUTS)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            threads = [threading.Thread(target=call) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len([w for w in caught if w.category is clinfast.ClinfastWarning]) == 1

    def test_what_was_asked_for_is_silent(self, monkeypatch):
        pair = Pair()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with clinfast.disabled(pair.model):
                run(pair.model, **INPUTS)
            monkeypatch.setenv("CLINFAST_DISABLE", "1")
            run(pair.model, **INPUTS)


def test_reasons_stay_bounded():
    pair = Pair()
    for length in range(1, 30):
        mask = torch.ones(1, length + 1, dtype=torch.long)
        run(pair.model, input_ids=ids(1, length), attention_mask=mask)
    assert pair.forward.fallbacks == {"attention_mask does not have the shape of input_ids": 29}
