"""Op by op or all layers in one call: the same bits, whatever the family's norms and sharing."""

import pytest
import torch
from bert_models import assert_equal, ids, make, right_padded, run
from relatives import make as relative

import clinfast
from clinfast import patch
from clinfast.engine.executors import EagerExecutor, NativeExecutor
from clinfast.ops import registry

SIZES = {
    "small": {},
    "head_dim-20": {"hidden_size": 60, "num_attention_heads": 3},
    "relu": {"hidden_act": "relu", "num_hidden_layers": 3},
    "tanh": {"hidden_act": "gelu_new", "layer_norm_eps": 0.1},
    "minilm": {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("head", "padding"), [("base", "remove"), ("base", "keep"), ("sequence", "remove")])
def test_same_bits(head, padding, size, dtype, one_thread):
    compare(clinfast.optimize(make(head, dtype=dtype, **SIZES[size]), padding=padding))


@pytest.mark.parametrize("head", ["base", "token"])
def test_same_bits_at_any_thread_count(head, thread_count):
    compare(clinfast.optimize(make(head, **SIZES["minilm"])))


FAMILIES = {
    "pre-norm": ("megatron-bert", {"num_hidden_layers": 3}),
    "pre-norm after a normed embedding": ("roberta-prelayernorm", {"hidden_act": "gelu_new"}),
    "relative bias": ("mpnet", {}),
    "shared": ("albert", {"num_hidden_layers": 4}),
    "shared in groups": ("albert", {"num_hidden_layers": 5, "num_hidden_groups": 3, "inner_group_num": 2}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("head", "padding"), [("base", "remove"), ("base", "keep"), ("sequence", "remove")])
def test_same_bits_in_other_families(head, padding, family, dtype, one_thread):
    name, fields = FAMILIES[family]
    model = relative(name, head, dtype=dtype, max_position_embeddings=80, **fields)
    compare(clinfast.optimize(model, padding=padding))


@pytest.mark.parametrize("family", ["megatron-bert", "albert", "mpnet"])
def test_more_rows_than_one_slice_of_the_ffn(family, one_thread):
    model = clinfast.optimize(relative(family, "token", max_position_embeddings=520))
    compare(model, [512] * 4 + [1])


def compare(model, *cases):
    ((_, _, forward),) = patch.find_patched(model)
    encoder = forward.encoder
    assert type(encoder._executor) is NativeExecutor
    for lengths in cases or ([40, 1, 17, 33], [1], [64] * 3):
        inputs = {"input_ids": ids(len(lengths), max(lengths)), "attention_mask": right_padded(lengths)}
        before = dict(registry.calls)
        native = run(model, **inputs)
        if encoder.weights().fused is not None:
            assert registry.calls["encoder_layer[cpu]"] > before.get("encoder_layer[cpu]", 0)
        before = dict(registry.calls)
        encoder._executor = EagerExecutor(encoder.spec, "auto")
        assert_equal(run(model, **inputs), native)
        name = "attention_biased[cpu]" if encoder.spec.relative_buckets else "attention[cpu]"
        assert registry.calls[name] == before.get(name, 0) + encoder.spec.num_layers
        encoder._executor = NativeExecutor(encoder.spec, "auto")
