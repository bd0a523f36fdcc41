"""What only DeBERTa has: lengths beyond the tables, two masked-LM heads, tables that follow their sources, refusals."""

import copy

import pytest
import torch
import transformers
from bert_models import Subject, assert_equal, ids, right_padded, run
from relatives import batch_for, make

import clinfast
from clinfast import forward, models, patch
from clinfast.engine.executors import EagerExecutor, NativeExecutor
from clinfast.engine.spec import Unsupported
from clinfast.ops import registry

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning")]

FAMILY = "deberta-v2"
# As published models have them, less wide.
V3 = {"position_buckets": 256, "max_position_embeddings": 512}
V2_OWN = {"share_att_key": False, "position_buckets": 16, "max_relative_positions": 50}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [V3, V2_OWN, {"position_buckets": -1, "max_relative_positions": 90}], ids=str)
def test_notes_beyond_the_rows_of_their_own(fields, dtype):
    s = Subject(make(FAMILY, "token", dtype=dtype, **fields))
    lengths = [300, 1, 129, 40]
    s.check(input_ids=ids(4, 300), attention_mask=right_padded(lengths))


def test_notes_longer_than_the_positions():
    """Stock has no bound where the embedding has no positions; with positions, it has."""
    s = Subject(make(FAMILY, "base", max_position_embeddings=16))
    s.check(input_ids=ids(2, 100), attention_mask=right_padded([100, 30]))
    biased = clinfast.optimize(make(FAMILY, "base", max_position_embeddings=16, position_biased_input=True))
    with pytest.raises(Exception, match="the model has 16 positions; truncate to 16"):
        run(biased, input_ids=ids(2, 17))


@pytest.mark.parametrize("head", ["token", "sequence"])
def test_holes_in_long_notes(head):
    s = Subject(make(FAMILY, head, **V3))
    mask = torch.ones(3, 260, dtype=torch.long)
    mask[0, 5:150] = 0
    mask[1, 1::2] = 0
    mask[2, 200:] = 0
    s.check(input_ids=ids(3, 260), attention_mask=mask)


@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 ties its dense layer to the embeddings, and fails"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_whose_decoder_is_the_word_embeddings(dtype):
    model = make(FAMILY, "mlm", legacy=False, dtype=dtype)
    with torch.no_grad():
        model.lm_predictions.lm_head.bias.normal_()
    s = Subject(model)
    inputs = batch_for(model)
    s.check(**inputs)
    for each in (s.model, s.stock, s.exact):
        with torch.no_grad():
            each.get_input_embeddings().weight.mul_(1.25)
            each.lm_predictions.lm_head.bias.add_(1)
    s._stock_errors = None
    s.check(**inputs)
    some = inputs["attention_mask"].bool() & (torch.arange(24) % 3 == 0)
    chosen = run(s.model, **inputs, logits_positions=some)["logits"]
    torch.testing.assert_close(chosen, run(s.model, **inputs)["logits"][some], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "tanh"])
def test_pooler_activations(act):
    s = Subject(make(FAMILY, "sequence", pooler_hidden_act=act))
    s.check(**batch_for(s.model))
    s.model.config.pooler_hidden_act = s.stock.config.pooler_hidden_act = "silu"
    s.check_stock(**batch_for(s.model))


SOURCES = {
    "the table": lambda m: m.deberta.encoder.rel_embeddings.weight,
    "its norm": lambda m: m.deberta.encoder.LayerNorm.bias,
    "a position projection": lambda m: m.deberta.encoder.layer[1].attention.self.pos_key_proj.weight,
    "the other one": lambda m: m.deberta.encoder.layer[0].attention.self.pos_query_proj.weight,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("through_data", [False, True])
def test_tables_follow_their_sources(source, through_data):
    s = Subject(make(FAMILY, "token", share_att_key=False))
    inputs = batch_for(s.model)
    before = s.check(**inputs)["logits"]
    for each in (s.model, s.stock, s.exact):
        weight = SOURCES[source](each)
        with torch.no_grad():
            (weight.data if through_data else weight).mul_(-1.5)
    s._stock_errors = None
    assert (s.check(**inputs)["logits"] - before).abs().max() > 1e-3


def test_shared_projections_follow_their_sources():
    s = Subject(make(FAMILY, "token"))
    inputs = batch_for(s.model)
    s.check(**inputs)
    for each in (s.model, s.stock, s.exact):
        with torch.no_grad():
            each.deberta.encoder.layer[0].attention.self.key_proj.weight.mul_(1.5)
    s._stock_errors = None
    s.check(**inputs)


def test_masks_with_other_values_run_stock():
    """Stock multiplies the embeddings by them."""
    s = Subject(make(FAMILY, "token"))
    inputs = batch_for(s.model)
    s.check_stock(**inputs | {"attention_mask": inputs["attention_mask"] * 2})
    s.check(**inputs)


def test_token_types_that_stock_ignores():
    s = Subject(make(FAMILY, "token"))
    inputs = batch_for(s.model)
    plain = run(s.model, **inputs)
    assert_equal(run(s.model, **inputs, token_type_ids=torch.full_like(inputs["input_ids"], 7)), plain)
    assert clinfast.report(s.model).calls_stock == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["base", "sequence"])
@pytest.mark.parametrize("mask", ["right", "holes"])
def test_same_bits_op_by_op_and_in_one_call(mask, head, dtype):
    model = clinfast.optimize(make(FAMILY, head, dtype=dtype, num_hidden_layers=3))
    ((_, _, patched),) = patch.find_patched(model)
    encoder = patched.encoder
    assert type(encoder._executor) is NativeExecutor
    inputs = {"input_ids": ids(3, 50), "attention_mask": right_padded([50, 1, 33])}
    if mask == "holes":
        inputs["attention_mask"][0, 3:9] = 0
    before = registry.calls["encoder_layer[cpu]"]
    native = run(model, **inputs)
    if encoder.weights().fused is not None:
        assert registry.calls["encoder_layer[cpu]"] > before
    encoder._executor = EagerExecutor(encoder.spec, "auto")
    before = registry.calls["attention_disentangled[cpu]"]
    assert_equal(run(model, **inputs), native)
    assert registry.calls["attention_disentangled[cpu]"] == before + 3


@pytest.mark.skipif(not forward.COMPILES, reason=f"torch {torch.__version__} compiles the stock model")
def test_compiled():
    model = make(FAMILY, "sequence")
    stock = copy.deepcopy(model)
    clinfast.optimize(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    holes = right_padded([20, 7, 13])
    holes[0, 4:9] = 0
    before = registry.calls["attention_disentangled[cpu]"]
    for mask in (right_padded([20, 7, 13]), holes):
        inputs = {"input_ids": ids(3, 20), "attention_mask": mask}
        torch.testing.assert_close(run(compiled, **inputs), run(stock, **inputs), rtol=0, atol=1e-4)
    assert registry.calls["attention_disentangled[cpu]"] > before
    with pytest.raises(Exception, match=r"column 0 is masked .* deberta-v2 does not serve that under torch.compile"):
        run(compiled, input_ids=ids(3, 20), attention_mask=right_padded([20, 7, 13]).flip(1))
    torch._dynamo.reset()


REFUSED = {
    "z_steps": (lambda m: setattr(m.deberta, "z_steps", 2), "z_steps is 2"),
    "a term": (lambda m: m.deberta.encoder.layer[0].attention.self.pos_att_type.append("p2p"), "pos_att_type has"),
    "an activation": (
        lambda m: setattr(m.deberta.encoder.layer[1].intermediate, "intermediate_act_fn", torch.nn.SiLU()), "SiLU",
    ),
    "layers that differ": (
        lambda m: setattr(m.deberta.encoder.layer[1].attention.self, "share_att_key", False), "pos_key_proj|relative",
    ),
    "rows": (
        lambda m: setattr(m.deberta.encoder, "rel_embeddings", torch.nn.Embedding(17, 64)), "does not have 16 rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proved_is_refused_by_name(name):
    edit, message = REFUSED[name]
    model = make(FAMILY, "token")
    edit(model)
    with pytest.raises((Unsupported, AttributeError), match=message):
        models.match(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conv_kernel_size": 3}, "encoder.conv is a convolution"),
        ({"embedding_size": 40}, "embed_proj is there"),
        ({"position_buckets": 7}, "position_buckets is 7"),
        ({"position_buckets": 2}, "position_buckets is 2"),
        ({"position_buckets": 8, "max_relative_positions": 5}, "max_relative_positions 5"),
    ],
)
def test_configs_that_are_refused_run_stock(fields, message):
    model = make(FAMILY, "base", **fields)
    with pytest.raises(Unsupported, match=message):
        models.match(model)


def test_a_pickle_and_a_copy_are_stock():
    model = clinfast.optimize(make(FAMILY, "token"))
    clean = copy.deepcopy(model)
    assert "forward" not in clean.__dict__ and type(clean) is transformers.DebertaV2ForTokenClassification
