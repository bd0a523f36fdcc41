"""BERT's relatives against stock transformers in float64: fields, masks, heads, bits, and what stays stock."""

import copy

import pytest
import torch
from bert_models import Subject, assert_equal, ids, right_padded, run
from relatives import (
    COUNTS_POSITIONS,
    FAMILIES,
    PAIRS,
    VOCAB,
    batch_for,
    labels_for,
    make,
    reads_first_token,
    shaped,
)
from transformers_version import FOUR

import clinfast
from clinfast import models
from clinfast.engine.spec import Unsupported
from clinfast.ops import registry

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning")]

FIELDS = {
    "gelu_new": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "head_dim-64": {"hidden_size": 128},
    "head_dim-80": {"hidden_size": 160},
    "head_dim-128": {"hidden_size": 256},
    "hidden-odd": {"hidden_size": 51, "num_attention_heads": 3},
    "one-layer": {"num_hidden_layers": 1},
    "intermediate-odd": {"intermediate_size": 131},
}
# Whose stock forward lets padded positions look at everything, hence not served with padding="keep".
NO_PADDING = ("deberta-v2",)
NOT_EVERYWHERE = {
    "eps": ({"layer_norm_eps": 0.3}, ("distilbert",)),
    "three-types": ({"type_vocab_size": 3}, ("distilbert", "mpnet", "modernbert")),
}
OWN = {
    "roberta": {
        "pad-0": {"pad_token_id": 0},
        "pad-3": {"pad_token_id": 3},
    },
    "electra": {
        "no-projection": {"embedding_size": 64},
        "wide-embedding": {"embedding_size": 96},
    },
    "distilbert": {"sinusoidal": {"sinusoidal_pos_embds": True}},
    "albert": {
        "gelu": {"hidden_act": "gelu"},
        "equal-projection": {"embedding_size": 64},
        "wide-embedding": {"embedding_size": 96},
        "two-groups": {"num_hidden_layers": 4, "num_hidden_groups": 2},
        "uneven-groups": {"num_hidden_layers": 5, "num_hidden_groups": 3},
        "inner-layers": {"num_hidden_layers": 3, "inner_group_num": 2},
        "last-alone": {"num_hidden_layers": 3, "num_hidden_groups": 2},
    },
    "deberta-v2": {
        "own-projections": {"share_att_key": False},
        "c2p-alone": {"share_att_key": False, "pos_att_type": "c2p"},
        "p2c-alone": {"pos_att_type": "p2c"},
        "terms-without-tables": {"relative_attention": False},
        "no-terms": {"pos_att_type": None},
        "no-buckets": {"position_buckets": -1},
        "no-buckets-and-short": {"position_buckets": -1, "max_relative_positions": 6},
        "short-and-bucketed": {"position_buckets": 6, "max_relative_positions": 13},
        "no-norm-of-the-table": {"norm_rel_ebd": "none"},
        "positions": {"position_biased_input": True},
        "three-types": {"type_vocab_size": 3},
    },
    "ernie": {
        "no-tasks": {"use_task_id": False},
        "five-tasks": {"task_type_vocab_size": 5},
    },
    "megatron-bert": {},
    "mpnet": {
        "more-rows": {"relative_attention_num_buckets": 40},
        "pad-3": {"pad_token_id": 3},
    },
    "roberta-prelayernorm": {"pad-3": {"pad_token_id": 3}},
    "nomic-bert": {
        "gelu": {"hidden_act": "gelu"},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    },
    "modernbert": {
        "window-0": {"local_attention": 1},
        "window-2": {"local_attention": 5},
        "window-wide": {"local_attention": 128},
        "local-only-after-first": {"global_attn_every_n_layers": 7},
        "global-only": {"global_attn_every_n_layers": 1},
        "thetas": {"global_rope_theta": 50.0, "local_rope_theta": 7.0},
        "all-biases": {name: True for name in ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")},
        "attention-bias": {"attention_bias": True},
        "no-decoder-bias": {"decoder_bias": False},
        "silu": {"hidden_activation": "silu"},
        "classifier-tanh": {"classifier_activation": "gelu_pytorch_tanh"},
    },
    "xlm-roberta-xl": {"pad-3": {"pad_token_id": 3}},
}
# XLM-RoBERTa and CamemBERT share RoBERTa's reader, so their own classes are run, and the fields are RoBERTa's to vary.
VARIED = {
    family: FIELDS | {name: fields for name, (fields, without) in NOT_EVERYWHERE.items() if family not in without} | own
    for family, own in OWN.items()
}
# Rotary embeddings turn pairs, and some families are newer than the oldest transformers that is served.
for family in ("modernbert", "nomic-bert"):
    del VARIED[family]["hidden-odd"]
VARIED = {family: fields for family, fields in VARIED.items() if family in FAMILIES}
# ModernBERT's own are the encoder's or the head's that all its classifiers share.
SHARED_HEADS = ("token", "qa", "choice")
FIELD_CASES = [
    (family, head, name)
    for family, head in PAIRS
    for name in VARIED.get(family, ())
    if not (family == "modernbert" and head in SHARED_HEADS and name in OWN["modernbert"])
]
DTYPES = [torch.float32, torch.bfloat16]

_subjects = {}


def subject(family, head, fields=(), **options):
    """Built once per configuration: tests only read it."""
    key = (family, head, repr(dict(fields)), *options.items())
    if key not in _subjects:
        dtype = options.pop("dtype", torch.float32)
        _subjects[key] = Subject(make(family, head, dtype=dtype, **dict(fields)), **options)
    return _subjects[key]


@pytest.mark.parametrize(("family", "head", "name"), FIELD_CASES)
def test_fields(family, head, name):
    s = subject(family, head, VARIED[family][name])
    s.check(**batch_for(s.model))


@pytest.mark.parametrize(("family", "head"), PAIRS)
@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"backend": "torch"}, {"padding": "keep"}], ids=str)
def test_dtype_backend_and_padding(family, head, options):
    if "padding" in options and family in NO_PADDING:
        with pytest.raises(Unsupported, match="padding='keep' is not served for " + family):
            subject(family, head, **options)
        return
    if FOUR and family == "modernbert" and "padding" in options:
        pytest.skip("refused: test_kept_padding_is_refused_on_transformers_4")
    s = subject(family, head, **options)
    before = dict(registry.calls)
    s.check(all_positions="padding" in options, **batch_for(s.model))
    backends = {name[name.index("[") :] for name, count in registry.calls.items() if count > before.get(name, 0)}
    assert backends == ({"[torch]"} if "backend" in options else {"[cpu]"})


MASKS = {
    "none": None,
    "ones": torch.ones(4, 20, dtype=torch.int64),
    "right": right_padded([20, 5, 1, 16]),
    "bool": right_padded([20, 5, 1, 16], dtype=torch.bool),
    "holes": torch.tensor([[1, 0, 1, 1, 0] * 4, [1] + [0] * 19, [1] * 20, [1, 0] * 10]),
    "left": right_padded([20, 5, 1, 16]).flip(1),
}


@pytest.mark.parametrize(("family", "head"), PAIRS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(family, head, mask):
    if (family, head, mask) == ("modernbert", "choice", "bool"):
        pytest.skip("stock takes the argmax of the mask, which bool has not")
    s = subject(family, head)
    inputs = {"input_ids": ids(4, 20)}
    if MASKS[mask] is not None:
        inputs["attention_mask"] = MASKS[mask]
    first_token = reads_first_token(family, head) or (head == "base" and getattr(s.model, "pooler", None) is not None)
    check = s.check_stock if mask == "left" and first_token else s.check
    check(**shaped(s.model, inputs))


@pytest.mark.parametrize("family", COUNTS_POSITIONS)
@pytest.mark.parametrize("head", ["base", "token"])
def test_positions_count_the_ids_that_are_no_pads(family, head):
    """Pad ids among the tokens keep the pad's position, and those behind them count on, as in stock."""
    s = subject(family, head)
    batch = ids(2, 20)
    batch[0, 4:7] = s.model.config.pad_token_id
    batch[1, 0] = s.model.config.pad_token_id
    s.check(input_ids=batch)


@pytest.mark.parametrize("family", COUNTS_POSITIONS)
def test_the_longest_note_ends_where_the_positions_do(family):
    s = subject(family, "token", {"max_position_embeddings": 30})
    longest = 30 - s.model.config.pad_token_id - 1
    batch = ids(1, longest + 1)
    batch[batch == s.model.config.pad_token_id] = 5
    s.check(input_ids=batch[:, :longest])
    with pytest.raises(Exception) as stock:
        run(s.stock, input_ids=batch)
    with pytest.raises(type(stock.value), match=f"the model has {longest} positions; truncate to {longest}"):
        run(s.model, input_ids=batch)
    s.check(input_ids=batch[:, :longest])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "head"), [("bert", "choice"), *PAIRS])
def test_a_note_has_the_same_bits_in_any_batch(family, head, dtype):
    from bert_models import make as bert

    model = bert(head, dtype=dtype) if family == "bert" else make(family, head, dtype=dtype)
    clinfast.optimize(model)
    lengths = [24, 1, 12, 7, 24, 3, 18, 2]
    notes = {"input_ids": ids(8, 24, vocab=VOCAB), "attention_mask": right_padded(lengths)}
    together = run(model, **shaped(model, notes))
    choices = 2 if head == "choice" else 1
    for row in range(8 // choices):
        mine = slice(row * choices, (row + 1) * choices)
        longest = max(lengths[mine])
        alone = run(model, **shaped(model, {name: value[mine, :longest] for name, value in notes.items()}))
        for name, value in alone.items():
            here = together[name][row : row + 1]
            here = here[:, :longest] if here.dim() > 1 and here.shape[1] == 24 else here
            assert torch.equal(here, value), (name, row)
    assert clinfast.report(model).calls_stock == 0


@pytest.mark.parametrize("family", [family for family, head in PAIRS if head == "qa"])
def test_no_argmax_over_a_span_head_picks_a_pad(family):
    s = subject(family, "qa")
    inputs = batch_for(s.model)
    pads = inputs["attention_mask"] == 0
    for value in run(s.model, **inputs).values():
        assert (value[pads] == torch.finfo(value.dtype).min).all()


@pytest.mark.parametrize(("family", "head"), PAIRS)
def test_what_only_stock_gives_is_stocks_to_the_bit(family, head):
    """Loss, hidden states, attentions, embeddings in place of ids, tuples."""
    s = subject(family, head)
    inputs = batch_for(s.model)
    embeds = s.model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {name: value for name, value in inputs.items() if name != "input_ids"} | {"inputs_embeds": embeds}
    cases = [
        inputs | {"output_hidden_states": True},
        inputs | {"return_dict": False},
        given,
    ]
    if FOUR and (family, head) == ("modernbert", "qa"):
        cases = cases[:-1]  # stock asks for ids
    if head != "base":
        cases.append(inputs | labels_for(family, head, inputs))
    for case in cases:
        with s.one_call("stock"), torch.no_grad():
            ours = s.model(**case)
        with torch.no_grad():
            theirs = s.stock(**case)
        assert type(ours) is type(theirs)
        flat_ours, flat_theirs = list(flatten(ours)), list(flatten(theirs))
        assert len(flat_ours) == len(flat_theirs) > 0
        assert all(torch.equal(a, b) for a, b in zip(flat_ours, flat_theirs, strict=True))
        assert ("labels" in case or "start_positions" in case) == (not isinstance(ours, tuple) and "loss" in ours)
    s.check(**inputs)


def flatten(output):
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        yield from flatten(tuple(output.values()))
    else:
        for value in output:
            yield from flatten(value)


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_come_from_stock(family):
    model = make(family, "token", attn_implementation="eager")
    s = Subject(model)
    with s.one_call("stock"), torch.no_grad():
        found = s.model(**batch_for(model), output_attentions=True).attentions
    with torch.no_grad():
        expected = s.stock(**batch_for(model), output_attentions=True).attentions
    assert len(found) == len(expected) == model.config.num_hidden_layers
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [VOCAB - 10, VOCAB + 10])
def test_resized_embeddings_run_stock_until_optimized_again(family, rows):
    model = make(family, "mlm")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied, "masked-LM models of these families tie their decoder"
    clinfast.optimize(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.manual_seed(1)
    model.resize_token_embeddings(rows)
    stock = copy.deepcopy(model)
    inputs = {"input_ids": ids(2, 9, vocab=rows), "attention_mask": right_padded([9, 4])}
    assert_equal(run(model, **inputs), run(stock, **inputs))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    clinfast.optimize(clinfast.restore(model))
    logits, expected = run(model, **inputs)["logits"], run(stock, **inputs)["logits"]
    assert logits.shape == (2, 9, rows) and clinfast.report(model).calls_fast == 1
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_tied_weights_reaches_both_ends(family):
    model = make(family, "mlm")
    s = Subject(model)
    for each in (s.model, s.stock, s.exact):
        with torch.no_grad():
            each.get_input_embeddings().weight.mul_(1.25)
    s._stock_errors = None
    s.check(**batch_for(model))


@pytest.mark.parametrize("family", ["megatron-bert", "xlm-roberta-xl"])
def test_published_widths(family):
    """GatorTron-large's 3,584 and XLM-R XL's 2,560, a layer of each, against float64."""
    hidden = 3584 if family == "megatron-bert" else 2560
    model = make(
        family, "token", hidden_size=hidden, num_attention_heads=hidden // 64, num_hidden_layers=1, intermediate_size=64
    )
    inputs = batch_for(model, right_padded([9, 4]), batch=2)
    clinfast.optimize(model)
    ours = run(model, **inputs)["logits"]
    assert clinfast.report(model).calls_fast == 1
    stock = run(clinfast.restore(model), **inputs)["logits"]
    exact = run(model.double(), **inputs)["logits"]
    real = inputs["attention_mask"].bool()
    errors = [(x[real] - exact[real]).abs().max().item() for x in (ours, stock)]
    assert errors[0] <= 2 * errors[1] + 1e-6 * exact[real].abs().max().item()


@pytest.mark.parametrize("given", [0, 1])
def test_given_task_types_run_stock(given):
    s = subject("ernie", "base", {"task_type_vocab_size": 5})
    inputs = batch_for(s.model)
    s.check_stock(**inputs, task_type_ids=torch.full_like(inputs["input_ids"], given))
    assert "the argument task_type_ids" in clinfast.report(s.model).units[0].fallbacks


@pytest.mark.parametrize(("field", "value"), [("num_hidden_layers", 2), ("num_hidden_groups", 1)])
def test_alberts_config_is_read_at_every_call(field, value):
    """Its stock forward takes the number of layers from there."""
    s = Subject(make("albert", num_hidden_layers=4, num_hidden_groups=2))
    inputs = batch_for(s.model)
    s.check(**inputs)
    before = getattr(s.model.config, field)
    for config in (s.model.config, s.stock.config):
        setattr(config, field, value)
    s.check_stock(**inputs)
    for each in (s.model, s.stock):
        setattr(each.config, field, before)
    s.check(**inputs)


def albert_layer(model):
    return model.encoder.albert_layer_groups[0].albert_layers[0]


REFUSED = {
    ("roberta", "base"): [
        (lambda m: setattr(m.embeddings, "padding_idx", None), "embeddings.padding_idx is None"),
        (lambda m: setattr(m.encoder.layer[1].intermediate, "intermediate_act_fn", torch.nn.SiLU()), "SiLU"),
        (lambda m: setattr(m.config, "is_decoder", True), "config.is_decoder is True"),
    ],
    ("electra", "choice"): [
        (lambda m: setattr(m.sequence_summary, "summary_type", "last"), "summary_type is 'last'"),
    ],
    ("electra", "qa"): [
        (lambda m: setattr(m, "qa_outputs", torch.nn.Linear(64, 3)), "qa_outputs has 3 outputs"),
    ],
    ("distilbert", "base"): [
        (lambda m: setattr(m.transformer.layer[0].ffn, "activation", torch.nn.SiLU()), "ffn.activation is"),
        (lambda m: setattr(m.transformer.layer[1].sa_layer_norm, "eps", 0.1), "sa_layer_norm.eps is 0.1"),
        (lambda m: setattr(m.transformer.layer[1].attention, "n_heads", 4), "layer.1 has num_heads 4"),
    ],
    ("albert", "token"): [
        (lambda m: setattr(albert_layer(m.albert).attention, "num_attention_heads", 1), "1 heads of 32"),
        (lambda m: m.albert.encoder.albert_layer_groups[0].albert_layers.append(torch.nn.ReLU()), "albert_layers.1 is"),
        (lambda m: setattr(m.albert.encoder, "embedding_hidden_mapping_in", torch.nn.ReLU()), "mapping_in is"),
    ],
    ("albert", "pretraining"): [
        (lambda m: setattr(m.sop_classifier, "dropout", torch.nn.Identity()), "sop_classifier.dropout is"),
    ],
    ("albert", "base"): [
        (lambda m: setattr(albert_layer(m), "activation", torch.nn.SiLU()), "albert_layers.0.activation is"),
        (lambda m: setattr(albert_layer(m).full_layer_layer_norm, "eps", 0.1), "full_layer_layer_norm.eps is 0.1"),
        (lambda m: setattr(albert_layer(m).attention, "is_causal", True), "attention.is_causal is True"),
        (lambda m: setattr(m, "pooler_activation", torch.nn.ReLU()), "pooler_activation is"),
        (lambda m: m.encoder.albert_layer_groups.append(m.encoder.albert_layer_groups[0]), "there are 2 groups"),
    ],
    ("ernie", "base"): [
        (lambda m: setattr(m.embeddings.task_type_embeddings, "max_norm", 1.0), "task_type_embeddings.max_norm is 1.0"),
    ],
    ("megatron-bert", "base"): [
        (lambda m: setattr(m.config, "is_decoder", True), "config.is_decoder is True"),
        (lambda m: setattr(m.encoder, "ln", torch.nn.Identity()), "encoder.ln is torch.nn.modules.linear.Identity"),
        (lambda m: setattr(m.encoder.layer[1].attention.ln, "eps", 0.1), "layer.1.attention.ln.eps is 0.1"),
        (lambda m: setattr(m.encoder.layer[0].intermediate, "intermediate_act_fn", torch.nn.SiLU()), "SiLU"),
    ],
    ("roberta-prelayernorm", "base"): [
        (lambda m: setattr(m.encoder.layer[1].intermediate.LayerNorm, "eps", 0.1), "intermediate.LayerNorm.eps is 0.1"),
        (lambda m: setattr(m.LayerNorm, "eps", 0.1), "LayerNorm.eps is 0.1"),
    ],
    ("xlm-roberta-xl", "base"): [
        (
            lambda m: setattr(m.encoder.layer[0].attention, "self_attn_layer_norm", torch.nn.Identity()),
            "attention.self_attn_layer_norm is",
        ),
    ],
}


@pytest.mark.parametrize(
    ("family", "head", "change", "words"),
    [(*pair, *case) for pair, cases in REFUSED.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(family, head, change, words):
    model = make(family, head)
    change(model)
    with pytest.raises(Unsupported) as caught:
        models.match(model)
    assert words in str(caught.value)
    if head == "base":
        stock = copy.deepcopy(model)
        with pytest.warns(clinfast.ClinfastWarning, match="left stock"):
            clinfast.optimize(model)
        assert words in str(clinfast.report(model))
        if "padding_idx" not in words:
            assert_equal(run(model, **batch_for(model)), run(stock, **batch_for(model)))
