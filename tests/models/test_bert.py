"""BERT against stock transformers: our error against float64 is at most twice stock's own."""

import copy

import pytest
import torch
from bert_models import (
    FIRST_TOKEN_READERS,
    HEADS,
    VOCAB,
    Subject,
    assert_equal,
    ids,
    make,
    real_rows,
    right_padded,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import clinfast
from clinfast.ops import registry

pytestmark = pytest.mark.usefixtures("one_thread")

# Every field that changes the arithmetic, one or two at a time around the small model of `make`.
FIELDS = {
    "plain": {},
    "gelu_new": {"hidden_act": "gelu_new"},
    "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "eps-1e-5": {"layer_norm_eps": 1e-5},
    "eps-large": {"layer_norm_eps": 0.5},
    "head_dim-1": {"hidden_size": 32, "num_attention_heads": 32},
    "head_dim-20": {"hidden_size": 60, "num_attention_heads": 3},
    "head_dim-64": {"hidden_size": 128, "num_attention_heads": 2},
    "head_dim-80": {"hidden_size": 160, "num_attention_heads": 2},
    "head_dim-128": {"hidden_size": 128, "num_attention_heads": 1},
    "head_dim-256": {"hidden_size": 256, "num_attention_heads": 1},
    "hidden-odd": {"hidden_size": 51, "num_attention_heads": 3},
    "one-type": {"type_vocab_size": 1},
    "five-types": {"type_vocab_size": 5},
    "one-layer": {"num_hidden_layers": 1},
    "three-layers": {"num_hidden_layers": 3},
    "intermediate-1": {"intermediate_size": 1},
    "intermediate-odd": {"intermediate_size": 131},
    "one-label": {"num_labels": 1},
    "nine-labels": {"num_labels": 9},
    "few-positions": {"max_position_embeddings": 13},
    "many-positions": {"max_position_embeddings": 600},
    "small-vocab": {"vocab_size": 3},
}

_subjects = {}


def subject(head, fields="plain", dtype=torch.float32, stock_dtype=None, **options):
    """Built once per configuration: tests only read it."""
    key = (head, fields, dtype, stock_dtype, *options.items())
    if key not in _subjects:
        model = make(head, dtype=dtype, **FIELDS[fields])
        _subjects[key] = Subject(model, stock_dtype=stock_dtype, **options)
    return _subjects[key]


def batch_for(config, mask=None):
    """Four notes, the longest as long as the model allows up to 40, with token types."""
    seqlen = min(config.max_position_embeddings, 40)
    batch = ids(4, seqlen, vocab=config.vocab_size)
    mask = right_padded([seqlen, 1, seqlen // 2, 7], seqlen) if mask is None else mask
    return {"input_ids": batch, "attention_mask": mask, "token_type_ids": batch % config.type_vocab_size}


# Question answering has two labels by definition.
CASES = [(fields, head) for fields in FIELDS for head in HEADS if not (head == "qa" and "label" in fields)]


@pytest.mark.parametrize(("fields", "head"), CASES)
def test_fields(fields, head):
    s = subject(head, fields)
    s.check(**batch_for(s.model.config))


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("head", ["base", "sequence", "token"])
def test_fields_bf16(head, fields):
    s = subject(head, fields, dtype=torch.bfloat16)
    s.check(**batch_for(s.model.config))


# The option, the model's own dtype, and the dtype in which stock is a fair measure.
PRECISIONS = [
    ("bf16", torch.float32, torch.bfloat16),
    ("bf16", torch.float16, torch.bfloat16),
    ("bf16", torch.bfloat16, None),
    ("fp32", torch.float32, None),
    ("fp32", torch.bfloat16, torch.float32),
    ("fp32", torch.float16, torch.float32),
]


@pytest.mark.parametrize(("precision", "dtype", "stock_dtype"), PRECISIONS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_precision_apart_from_the_models_own(head, precision, dtype, stock_dtype, backend):
    s = subject(head, dtype=dtype, stock_dtype=stock_dtype, precision=precision, backend=backend)
    s.check(**batch_for(s.model.config))


@pytest.mark.parametrize("fields", ["plain", "head_dim-20", "relu", "gelu_tanh", "five-types", "hidden-odd"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_backend(head, fields, dtype):
    s = subject(head, fields, dtype=dtype, backend="torch")
    before = dict(registry.calls)
    s.check(**batch_for(s.model.config))
    new = {name for name, count in registry.calls.items() if count > before.get(name, 0)}
    assert "attention[torch]" in new and not any("[cpu]" in name for name in new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("head", HEADS)
def test_padding_keep_computes_padded_positions_as_stock(head, backend, dtype):
    s = subject(head, dtype=dtype, backend=backend, padding="keep")
    s.check(all_positions=True, **batch_for(s.model.config))
    holes = right_padded([40, 9, 17, 30]) * (ids(4, 40, seed=5) % 3 > 0)
    holes[:, 0] = 1
    s.check(all_positions=True, **batch_for(s.model.config, holes))


def test_each_compiled_kernel_runs():
    s = subject("base")
    before = dict(registry.calls)
    s.check(**batch_for(s.model.config))
    layers = s.model.config.num_hidden_layers
    ran = {name: count - before.get(name, 0) for name, count in registry.calls.items()}
    assert ran["pack[cpu]"] == ran["embedding[cpu]"] == ran["unpack[cpu]"] == ran["pooling[cpu]"] == 1
    # A layer is one call, or one of each op.
    if ran.get("encoder_layer[cpu]", 0) != layers:
        assert ran["attention[cpu]"] == layers and ran["layer_norm[cpu]"] == 2 * layers
    assert not any(count for name, count in ran.items() if "[torch]" in name)


MASKS = {
    "ones": torch.ones(4, 24, dtype=torch.int64),
    "right": right_padded([24, 5, 1, 16]),
    "right-all-short": right_padded([11, 5, 1, 3], 24),
    "one-token-notes": right_padded([1, 1, 1, 1], 24),
    "holes": torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0] * 3, [1] + [0] * 23, [1] * 24, [1, 0] * 12]),
    "bool": right_padded([24, 5, 1, 16], dtype=torch.bool),
    "int32": right_padded([24, 5, 1, 16], dtype=torch.int32),
    "int16": right_padded([24, 5, 1, 16], dtype=torch.int16),
    "uint8": right_padded([24, 5, 1, 16], dtype=torch.uint8),
    "transposed": right_padded([24, 5, 1, 16]).t().contiguous().t(),
    "expanded": torch.ones(1, 1, dtype=torch.int64).expand(4, 24),
    "sliced": right_padded([48, 10, 2, 32])[:, ::2],
}
LEFT = torch.flip(right_padded([24, 5, 1, 16]), [1])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head", HEADS)
def test_masks(head, mask):
    subject(head).check(input_ids=ids(4, 24), attention_mask=MASKS[mask])


@pytest.mark.parametrize("head", HEADS)
def test_no_mask_means_all_ones(head):
    s = subject(head)
    ones = s.check(input_ids=ids(4, 24), attention_mask=MASKS["ones"])
    assert_equal(s.check(input_ids=ids(4, 24)), ones)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_left_padding(head, dtype):
    s = subject(head, dtype=dtype)
    if head in FIRST_TOKEN_READERS:
        s.check_stock(input_ids=ids(4, 24), attention_mask=LEFT)
    else:
        s.check(input_ids=ids(4, 24), attention_mask=LEFT)


@pytest.mark.parametrize("padding", ["remove", "keep"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("head", ["no-pooler", "token"])
def test_a_row_without_tokens_is_finite_and_leaves_the_others_alone(head, backend, padding):
    s = subject(head, backend=backend, padding=padding)
    mask = right_padded([24, 0, 7, 0])
    ours = s.check(input_ids=ids(4, 24), attention_mask=mask)
    (values,) = ours.values()
    assert values.isfinite().all()
    if padding == "remove":
        assert not values[[1, 3]].any()
    alone = run(s.model, input_ids=ids(4, 24)[[0, 2]], attention_mask=mask[[0, 2]])
    (expected,) = alone.values()
    assert torch.equal(values[[0, 2]], expected)


@pytest.mark.parametrize("head", ["no-pooler", "token"])
def test_a_batch_without_any_token(head):
    mask = torch.zeros(2, 9, dtype=torch.int64)
    (values,) = run(subject(head).model, input_ids=ids(2, 9), attention_mask=mask).values()
    assert values.shape[:2] == (2, 9) and not values.any()


@pytest.mark.parametrize("head", FIRST_TOKEN_READERS)
def test_a_row_without_tokens_goes_to_stock_where_the_first_token_is_read(head):
    subject(head).check_stock(input_ids=ids(3, 24), attention_mask=right_padded([24, 0, 7]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["base", "no-pooler", "token"])
def test_padded_positions_are_zero(head, dtype):
    s = subject(head, dtype=dtype)
    for name in ("right", "holes", "one-token-notes"):
        ours = run(s.model, input_ids=ids(4, 24), attention_mask=MASKS[name])
        for value in ours.values():
            if value.dim() == 3:
                assert not value[MASKS[name] == 0].any()
                assert value[MASKS[name] == 1].any(-1).all()


@pytest.mark.parametrize("head", HEADS)
def test_positions_are_columns_not_ranks(head):
    """A token behind a hole keeps the position of its column."""
    s = subject(head)
    mask = torch.ones(1, 12, dtype=torch.int64)
    mask[0, 3:8] = 0
    ours = s.check(input_ids=ids(1, 12), attention_mask=mask)
    by_rank = run(s.stock, input_ids=ids(1, 12)[mask.bool()][None])
    for name, value in ours.items():
        assert (value[:, -1] - by_rank[name][:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("types", [None, 0, 1, "mixed"])
def test_ids_and_token_types(head, dtype, types):
    batch = ids(3, 20).to(dtype)
    inputs = {"input_ids": batch, "attention_mask": right_padded([20, 3, 11])}
    if types is not None:
        inputs["token_type_ids"] = batch % 2 if types == "mixed" else torch.full_like(batch, types)
    subject(head).check(**inputs)


def test_inputs_of_any_strides():
    s = subject("base")
    batch = ids(20, 3).t()
    types = (ids(3, 40) % 2)[:, ::2]
    mask = right_padded([20, 3, 11]).t().contiguous().t()
    strided = s.check(input_ids=batch, attention_mask=mask, token_type_ids=types)
    dense = run(
        s.model, input_ids=batch.contiguous(), attention_mask=mask.contiguous(), token_type_ids=types.contiguous()
    )
    assert_equal(strided, dense)


@pytest.mark.parametrize("head", HEADS)
def test_the_last_position_is_usable(head):
    s = subject(head, "few-positions")
    s.check(input_ids=ids(2, 13), attention_mask=right_padded([13, 13]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", ["plain", "one-layer", "three-layers", "head_dim-20"])
def test_first_token_pruning_changes_nothing(fields, dtype):
    """The classifier's last layer works on one row a note; the base model's works on all of them."""
    classifier = make("sequence", dtype=dtype, **FIELDS[fields])
    base = make("base", dtype=dtype, **FIELDS[fields])
    base.load_state_dict(classifier.bert.state_dict())
    head = copy.deepcopy(classifier.classifier)
    s = Subject(classifier)
    clinfast.optimize(base)
    inputs = {"input_ids": ids(5, 40), "attention_mask": right_padded([40, 1, 2, 33, 17])}
    pruned = s.check(**inputs)["logits"]
    with torch.no_grad():
        unpruned = head(run(base, **inputs)["pooler_output"])
    tolerance = 4 * torch.finfo(dtype).eps * unpruned.abs().max().item()
    torch.testing.assert_close(pruned, unpruned, rtol=0, atol=tolerance)


@st.composite
def batches(draw):
    batch, seqlen = draw(st.integers(1, 6)), draw(st.integers(1, 64))
    seed = draw(st.integers(0, 2**31))
    kind = draw(st.sampled_from(["none", "right", "holes", "first-only"]))
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, VOCAB, (batch, seqlen), generator=generator)
    inputs = {"input_ids": input_ids.to(draw(st.sampled_from([torch.int32, torch.int64])))}
    if kind != "none":
        lengths = torch.randint(1, seqlen + 1, (batch,), generator=generator).tolist()
        mask = right_padded([1] * batch if kind == "first-only" else lengths, seqlen)
        if kind == "holes":
            mask = mask * torch.randint(0, 2, (batch, seqlen), generator=generator)
            mask[:, 0] = 1
        inputs["attention_mask"] = mask.to(draw(st.sampled_from([torch.bool, torch.int32, torch.int64])))
    if draw(st.booleans()):
        inputs["token_type_ids"] = torch.randint(0, 2, (batch, seqlen), generator=generator)
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", ["remove", "keep"])
@pytest.mark.parametrize("head", ["base", "sequence", "token"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(inputs=batches())
def test_any_shape_and_mask(head, padding, dtype, inputs):
    s = subject(head, "three-layers", dtype=dtype, padding=padding)
    s.check(all_positions=padding == "keep", **inputs)


@pytest.mark.parametrize("head", ["base", "sequence", "token"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(inputs=batches())
def test_both_backends_agree(head, inputs):
    compiled, plain = subject(head, backend="cpu"), subject(head, backend="torch")
    ours, theirs = run(compiled.model, **inputs), run(plain.model, **inputs)
    for name in ours:
        a, b = (real_rows(x[name], inputs.get("attention_mask")) for x in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_notes_at_real_width(dtype):
    """BERT-base's own layer sizes, over 512 columns and more rows than one slice of the FFN."""
    s = Subject(
        make(
            "base", dtype=dtype, hidden_size=768, num_attention_heads=12, intermediate_size=3072,
            num_hidden_layers=1, max_position_embeddings=512,
        )
    )  # fmt: skip
    s.check(input_ids=ids(4, 512), attention_mask=right_padded([512, 511, 400, 130]))


def test_an_encoder_without_layers_is_left_stock():
    model = make("base", num_hidden_layers=0)
    with pytest.warns(clinfast.ClinfastWarning, match="layer"):
        clinfast.optimize(model)
    assert "layer" in str(clinfast.report(model).units[0].refused)
    assert run(model, input_ids=ids(1, 4))["last_hidden_state"].shape == (1, 4, 64)
