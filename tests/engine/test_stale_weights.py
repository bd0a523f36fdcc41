"""Packed weights are caches: whatever is done to the live ones, the next call computes with those."""

import copy
import multiprocessing

import pytest
import torch
from bert_models import ids, make, randomize, right_padded, run
from relatives import make as relative

import clinfast
from clinfast import patch
from clinfast.engine.spec import ParameterRef, Unsupported
from clinfast.engine.weights import Fingerprint

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning"),
]

INPUTS = {"input_ids": ids(3, 20), "attention_mask": right_padded([20, 7, 13])}
HEADS = ["base", "sequence", "token", "mlm"]


def encoder_of(model):
    ((_, _, forward),) = patch.find_patched(model)
    return forward.encoder


def assert_fresh(model, before=None, kind="fast"):
    """The model gives what a stock copy made now gives; and not what it gave `before`."""
    fast, stock = clinfast.report(model).calls_fast, clinfast.report(model).calls_stock
    ours = run(model, **INPUTS)
    report = clinfast.report(model)
    assert (report.calls_fast - fast, report.calls_stock - stock) == ((1, 0) if kind == "fast" else (0, 1)), report
    # Computed in float32: a bf16 model's own rounding would hide a stale weight.
    expected = run(copy.deepcopy(model).float(), **INPUTS)
    tolerance = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.3}[model.dtype]
    assert difference(ours, expected) < tolerance
    assert before is None or difference(before, expected) > 5 * tolerance, "the edit was too small to tell"
    return ours


def difference(a, b):
    """Largest over all outputs, at real tokens."""
    worst = 0.0
    for name, value in b.items():
        mask = INPUTS["attention_mask"].bool() if value.dim() == 3 else slice(None)
        worst = max(worst, (a[name][mask].float() - value[mask].float()).abs().max().item())
    return worst


def optimized(head="base", **options):
    model = clinfast.optimize(make(head), **options)
    return model, run(model, **INPUTS)


@torch.no_grad()
def flip(model):
    for parameter in model.parameters():
        parameter.mul_(-0.7)


def flip_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(-0.7)


def load(model):
    model.load_state_dict(make_like(model).state_dict())


def load_assign(model):
    model.load_state_dict(make_like(model).state_dict(), assign=True)


def make_like(model):
    other = copy.deepcopy(model)
    torch.manual_seed(77)
    randomize(other)
    return other


def initialise_anew(model):
    torch.manual_seed(78)
    randomize(model)


def swap_data(model):
    other = make_like(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data


def set_storage(model):
    other = make_like(model)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.set_(theirs.detach())


def vector(model):
    other = make_like(model)
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(other.parameters()).detach(), model.parameters()
    )


def numpy_view(model):
    for parameter in model.parameters():
        parameter.detach().numpy()[...] *= -0.7


def copy_storage(model):
    other = make_like(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.untyped_storage().copy_(theirs.untyped_storage())


def averaged(model):
    other = make_like(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data.copy_(0.5 * mine.data + 0.5 * theirs.data)


EDITS = {
    function.__name__: function
    for function in (
        flip, flip_data, load, load_assign, initialise_anew, swap_data, set_storage, vector, numpy_view,
        copy_storage, averaged,
    )
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("head", HEADS)
def test_edits_of_all_weights(head, edit):
    model, before = optimized(head)
    if head == "mlm" and edit in ("load_assign", "set_storage"):
        model.config.tie_word_embeddings = False
    EDITS[edit](model)
    assert_fresh(model, before)


def tensors_to_edit():
    return [name for name, _ in make("base").named_parameters()] + ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("how", ["no_grad", "data"])
@pytest.mark.parametrize("name", tensors_to_edit())
def test_an_edit_of_any_one_weight(name, how):
    model, before = optimized("sequence" if name.startswith("classifier") else "base")
    parameter = model.get_parameter(name)
    if how == "no_grad":
        with torch.no_grad():
            parameter.mul_(-1).add_(0.5)
    else:
        parameter.data.mul_(-1).add_(0.5)
    # Softmax is blind to a constant that is added to every key.
    assert_fresh(model, None if name.endswith("key.bias") else before)


@pytest.mark.parametrize("rows", [1, 2])
def test_refresh_sees_a_write_to_single_rows_through_data(rows):
    model, before = optimized()
    weight = model.encoder.layer[0].intermediate.dense.weight
    weight.data[5 : 5 + rows] += 3.0
    clinfast.refresh(model)
    assert_fresh(model, before)


@pytest.mark.parametrize("call", ["train", "grad"])
def test_after_a_call_in_training_or_grad_mode_no_write_is_missed(call):
    """What a training step changes need not lie where the samples are."""
    model, before = optimized()
    model.train(call == "train")
    model(**INPUTS)
    model.encoder.layer[0].intermediate.dense.weight.data[5] += 3.0
    model.eval()
    assert_fresh(model, before)


def test_embedding_rows_are_read_live():
    model, before = optimized()
    model.embeddings.word_embeddings.weight.data[INPUTS["input_ids"][0, 1]] *= -2.0
    assert_fresh(model, before)


CASTS = {
    "half-float": lambda model: model.half().float(),
    "bf16-float": lambda model: model.to(torch.bfloat16).float(),
    "double-float": lambda model: model.double().float(),
    "half": lambda model: model.half(),
    "bf16": lambda model: model.to(torch.bfloat16),
    "bf16-twice": lambda model: model.to(torch.bfloat16).to(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
@pytest.mark.parametrize("head", ["base", "token"])
def test_casts(head, precision, cast):
    model, before = optimized(head, precision=precision)
    flip_data(model)
    CASTS[cast](model)
    served = not (model.dtype is torch.float16 and precision == "auto")
    if precision == "bf16":
        assert difference(run(model, **INPUTS), run(copy.deepcopy(model).float(), **INPUTS)) < 0.3
    else:
        assert_fresh(model, before, kind="fast" if served else "stock")
    assert all(value.dtype is model.dtype for value in run(model, **INPUTS).values())
    if precision != "bf16":
        model.float()
        assert_fresh(model)
        assert clinfast.report(model).units[0].facts["compute_dtype"] == "float32"


def test_a_cast_and_back_onto_the_same_memory_is_seen():
    """Freed memory that is handed out again has the old pointer, and a cast moves no version."""
    model, before = optimized()
    old = {p.data_ptr() for p in model.parameters()}
    for p in model.parameters():
        p.data = p.data * -0.7
    assert not old & {p.data_ptr() for p in model.parameters()}, "the packed-from memory was freed"
    assert_fresh(model, before)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_steps_between_calls(name, mode):
    model, before = optimized("sequence")
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        getattr(model, mode)()
        loss = model(**INPUTS, labels=torch.tensor([0, 1, 0])).loss
        # An evaluation between the training call and its step packs the weights of before the step.
        model.eval()
        run(model, **INPUTS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        before = assert_fresh(model, before)


def test_gradients_flow_through_an_optimized_model():
    model, _ = optimized("sequence")
    stock = copy.deepcopy(model)
    for each in (model, stock):
        each(**INPUTS, labels=torch.tensor([0, 1, 0])).loss.backward()
    for mine, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


def test_packs_once_while_nothing_changes():
    model, _ = optimized()
    encoder = encoder_of(model)
    assert encoder.packs == 1
    for _ in range(5):
        run(model, **INPUTS)
    assert encoder.packs == 1
    flip(model)
    for _ in range(5):
        run(model, **INPUTS)
    assert encoder.packs == 2


def test_share_memory_packs_anew_once():
    model, before = optimized()
    model.share_memory()
    ours = assert_fresh(model)
    assert all(torch.equal(ours[name], before[name]) for name in ours)
    run(model, **INPUTS)
    assert encoder_of(model).packs == 2


def _flip_in_child(model):
    flip_data(model)


def test_a_child_process_writes_to_shared_weights():
    model, _ = optimized()
    model.share_memory()
    before = run(model, **INPUTS)
    child = multiprocessing.get_context("spawn").Process(target=_flip_in_child, args=(model,))
    child.start()
    child.join(300)
    assert child.exitcode == 0
    assert_fresh(model, before)


def test_resized_embeddings_are_never_stale():
    model, _ = optimized("mlm")
    model.resize_token_embeddings(150)
    with_new_ids = {**INPUTS, "input_ids": INPUTS["input_ids"] + 50}
    assert difference(run(model, **with_new_ids), run(copy.deepcopy(model), **with_new_ids)) < 1e-4
    clinfast.optimize(clinfast.restore(model))
    assert_fresh(model)


def test_tied_embeddings_stay_tied():
    model, before = optimized("mlm")
    decoder = model.get_output_embeddings().weight
    assert decoder is model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        decoder.mul_(-0.5)
    assert_fresh(model, before)


def replace_dense(model):
    torch.manual_seed(5)
    layer = model.encoder.layer[1].output
    layer.dense = torch.nn.Linear(layer.dense.in_features, layer.dense.out_features)


def truncate(model):
    model.encoder.layer = model.encoder.layer[:1]


def truncate_in_place(model):
    del model.encoder.layer[1]


def swap_layers(model):
    model.encoder.layer[0], model.encoder.layer[1] = model.encoder.layer[1], model.encoder.layer[0]


def replace_norm(model):
    model.encoder.layer[0].output.LayerNorm = torch.nn.LayerNorm(64, eps=0.3)


def change_eps(model):
    model.encoder.layer[0].output.LayerNorm.eps = 0.9


def change_activation(model):
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = torch.nn.ReLU()


def change_scaling(model):
    for layer in model.encoder.layer:
        layer.attention.self.scaling *= 3


def replace_word_embeddings(model):
    torch.manual_seed(6)
    model.set_input_embeddings(torch.nn.Embedding(97, 64))


SURGERY = {
    function.__name__: function
    for function in (
        replace_dense, truncate, truncate_in_place, swap_layers, replace_norm, change_eps, change_activation,
        change_scaling, replace_word_embeddings,
    )
}  # fmt: skip


@pytest.mark.parametrize("surgery", SURGERY)
def test_surgery_runs_stock_until_it_is_optimized_again(surgery):
    model, before = optimized()
    SURGERY[surgery](model.eval())
    model.eval()
    assert_fresh(model, before, kind="stock")
    clinfast.restore(model)
    try:
        clinfast.optimize(model, strict=True)
    except Unsupported as refusal:
        assert surgery in ("change_eps", "replace_norm") and "eps" in str(refusal)
    else:
        assert_fresh(model, before)


def test_a_new_parameter_of_the_same_shape_is_packed():
    model, before = optimized()
    torch.manual_seed(4)
    model.encoder.layer[0].output.dense.weight = torch.nn.Parameter(torch.randn(64, 96))
    assert_fresh(model, before)


def test_refresh_and_is_stale_agree():
    model, _ = optimized()
    encoder = encoder_of(model)
    assert encoder.is_stale() is None
    flip_data(model)
    assert "without a version" in encoder.is_stale()
    clinfast.refresh(model)
    assert encoder.is_stale() is None
    flip(model)
    assert "written to" in encoder.is_stale()
    run(model, **INPUTS)
    assert encoder.is_stale() is None


def test_models_made_under_inference_mode():
    with torch.inference_mode():
        model = make()
        clinfast.optimize(model)
        before = run(model, **INPUTS)
        flip_data(model)
        ours = run(model, **INPUTS)
        stock = patch.stock_forward(model, **INPUTS)
    assert clinfast.report(model).calls_stock == 0
    mask = INPUTS["attention_mask"].bool()
    assert torch.allclose(ours["last_hidden_state"][mask], stock.last_hidden_state[mask], atol=1e-4)
    assert difference(ours, before) > 1e-2


def test_optimized_under_inference_mode_and_used_outside():
    model = make()
    with torch.inference_mode():
        clinfast.optimize(model)
    before = run(model, **INPUTS)
    flip(model)
    assert_fresh(model, before)


def test_extra_memory_is_at_most_one_copy_of_the_weights():
    for dtype in (torch.float32, torch.bfloat16):
        for head in ("base", "sequence", "token"):
            model = clinfast.optimize(make(head, dtype=dtype, vocab_size=500, hidden_size=128, intermediate_size=512))
            weights = sum(p.nbytes for p in model.parameters())
            assert 0 < encoder_of(model).packed_bytes <= weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (7, 5), (2, 3, 4)])
def test_samples_stand_inside_the_tensor_and_see_dense_edits(shape, dtype):
    weight = torch.nn.Parameter(torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype))
    holder = torch.nn.Module()
    holder.weight = weight
    fingerprint = Fingerprint([ParameterRef(holder, "weight")])
    assert fingerprint.changed() is None
    weight.data.mul_(1.5)
    assert fingerprint.changed() is not None


def test_samples_of_a_transposed_weight():
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(torch.randn(6, 9).t())
    fingerprint = Fingerprint([ParameterRef(holder, "weight")])
    assert fingerprint.changed() is None
    holder.weight.data.mul_(2)
    assert fingerprint.changed() is not None


def test_transposed_weights_are_computed_right():
    model = make()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight = torch.nn.Parameter(module.weight.detach().t().contiguous().t())
    clinfast.optimize(model)
    assert_fresh(model)


OF_RELATIVES = [
    ("albert", "encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight"),
    ("albert", "encoder.albert_layer_groups.0.albert_layers.0.ffn_output.bias"),
    ("albert", "encoder.embedding_hidden_mapping_in.weight"),
    ("ernie", "embeddings.task_type_embeddings.weight"),
    ("megatron-bert", "encoder.layer.1.ln.weight"),
    ("megatron-bert", "encoder.ln.bias"),
    ("mpnet", "encoder.relative_attention_bias.weight"),
    ("roberta-prelayernorm", "LayerNorm.weight"),
]


@pytest.mark.parametrize(("family", "path"), OF_RELATIVES)
@pytest.mark.parametrize("through", ["version", "data"])
def test_any_edit_of_a_relatives_weights_is_seen(family, path, through):
    model = clinfast.optimize(relative(family, num_hidden_layers=3))
    before = run(model, **INPUTS)
    parameter = model.get_parameter(path)
    edited = parameter.data if through == "data" else parameter.detach()
    edited.mul_(-3).add_(torch.linspace(-3, 3, parameter.numel()).view(parameter.shape))
    assert_fresh(model, before)


@pytest.mark.parametrize("head", ["base", "sequence"])
def test_shared_layers_are_packed_once(head):
    def packed(layers):
        model = clinfast.optimize(relative("albert", head, num_hidden_layers=layers))
        return encoder_of(model).weights()

    one, many = packed(2), packed(12)
    assert one.nbytes == many.nbytes and len(one.linears()) == len(many.linears())
    assert len({id(layer) for layer in many.layers}) == 1 and many.last in (None, many.layers[0])
    assert (len(many.layers), many.last is None) == ((12, True) if head == "base" else (11, False))
