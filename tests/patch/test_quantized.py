"""Linears that torchao and bitsandbytes made: seen, run stock, and the reason is in the report."""

import copy

import pytest
from bert_models import assert_equal, make, run
from patched_models import INPUTS, Pair

import clinfast
from clinfast.engine.spec import Unsupported

pytestmark = pytest.mark.filterwarnings("ignore")
QUERY = "bert.encoder.layer.0.attention.self.query"


def torchao_int8(model):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def torchao_int8_dynamic(model):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())


def bitsandbytes_8bit(model):
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    replace(model, library.nn.Linear8bitLt(64, 64, has_fp16_weights=False))


def bitsandbytes_4bit(model):
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    replace(model, library.nn.Linear4bit(64, 64))


def replace(model, linear):
    linear.load_state_dict(model.get_submodule(QUERY).state_dict())
    model.get_submodule(QUERY.rpartition(".")[0]).query = linear.to("cpu").eval()


KINDS = {
    "torchao-int8": (torchao_int8, "torchao.*Tensor, not torch.nn.Parameter; optimize a copy that is not quantized"),
    "torchao-int8-dynamic": (torchao_int8_dynamic, "torchao.*Tensor, not torch.nn.Parameter"),
    "bitsandbytes-8bit": (bitsandbytes_8bit, "bitsandbytes.*Int8Params.*load the model without quantization"),
    "bitsandbytes-4bit": (bitsandbytes_4bit, "bitsandbytes.*Params4bit.*load the model without quantization"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_before_is_left_stock_with_the_reason(kind):
    quantize, words = KINDS[kind]
    model = make("token")
    quantize(model)
    expected = run(model, **INPUTS)
    with pytest.raises(Unsupported, match=words):
        clinfast.optimize(model, strict=True)
    clinfast.optimize(model)
    assert_equal(run(model, **INPUTS), expected)
    (unit,) = clinfast.report(model).units
    assert "encoder.layer.0.attention.self.query.weight is" in unit.refused and unit.calls_fast == 0


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_after_is_seen_at_the_next_call(kind):
    quantize, _ = KINDS[kind]
    pair = Pair("token")
    pair.check_fast()
    quantize(pair.model)
    expected = copy.deepcopy(pair.stock)
    quantize(expected)
    assert_equal(run(pair.model, **INPUTS), run(expected, **INPUTS))
    assert pair.forward.calls_fast == 1 and pair.forward.calls_stock == 1
    (reason,) = pair.forward.fallbacks
    assert "attention.self" in reason
    changed = (run(pair.model, **INPUTS)["logits"] - run(pair.stock, **INPUTS)["logits"]).abs().max()
    assert changed > 0, "quantised weights compute something else, and that is what came out"
