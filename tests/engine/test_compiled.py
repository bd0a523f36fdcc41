"""Under torch.compile the packed encoder is one opaque op: no graph break, no recompile by value, never stale."""

import copy
import gc
import shutil

import pytest
import torch
from bert_models import HEADS, ids, make, right_padded, run
from relatives import make as relative
from torch._dynamo.testing import CompileCounterWithBackend

import clinfast
from clinfast import forward, patch
from clinfast.engine import compiled
from clinfast.ops import registry

pytestmark = [
    pytest.mark.skipif(not forward.COMPILES, reason=f"torch {torch.__version__} compiles the stock model"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning"),
]

INPUTS = {"input_ids": ids(3, 20), "attention_mask": right_padded([20, 7, 13])}
LEFT = {"input_ids": ids(3, 20), "attention_mask": torch.flip(right_padded([20, 7, 13]), [1])}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    compiled._made.clear()
    yield
    torch._dynamo.reset()


def compile_counted(model, backend="eager", **options):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


def ops_of(counter):
    """Names of our ops in the last graph, and how many others call a function of torch."""
    names = [str(node.target) for node in counter.graphs[-1].graph.nodes if node.op == "call_function"]
    return [name for name in names if "clinfast" in name], [name for name in names if "clinfast" not in name]


def is_fast(counter):
    ours, others = ops_of(counter)
    return ours == ["clinfast.encode"] and not any("embedding" in name for name in others)


def assert_close(a, b, atol=1e-4, mask=None):
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name], b[name]
        if mask is not None and x.dim() == 3:
            x, y = x[mask.bool()], y[mask.bool()]
        torch.testing.assert_close(x.float(), y.float(), rtol=0, atol=atol)


OPTIONS = [{}, {"backend": "torch"}, {"padding": "keep"}, {"precision": "bf16"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_same_bits_as_without_compile(head, options):
    backend = "eager" if options else "aot_eager"
    model = clinfast.optimize(make(head), **options)
    eager = run(model, **INPUTS)
    fast, counter = compile_counted(model, backend)
    out = run(fast, **INPUTS)
    assert ops_of(counter)[0] == ["clinfast.encode"] and counter.frame_count == 1
    assert out.keys() == eager.keys()
    for name in out:
        if head in ("qa", "mlm"):
            torch.testing.assert_close(out[name], eager[name], rtol=0, atol=1e-5)
        else:
            assert torch.equal(out[name], eager[name])


@pytest.mark.parametrize("family", ["albert", "ernie", "megatron-bert", "mpnet", "roberta-prelayernorm"])
@pytest.mark.parametrize("head", ["base", "sequence"])
def test_the_op_knows_norms_sharing_task_types_and_biases(family, head):
    model = clinfast.optimize(relative(family, head, num_hidden_layers=3))
    eager = run(model, **INPUTS)
    fast, counter = compile_counted(model)
    out = run(fast, **INPUTS)
    assert ops_of(counter)[0] == ["clinfast.encode"] and counter.frame_count == 1
    assert out.keys() == eager.keys() and all(torch.equal(out[name], eager[name]) for name in out)


SHAPES = [(2, 9), (3, 17), (4, 33), (7, 2), (5, 5), (2, 64), (9, 3), (6, 21), (3, 50), (2, 2)]


@pytest.mark.parametrize("head", ["base", "sequence", "token"])
def test_at_most_two_compiles_over_ten_shapes(head):
    model = clinfast.optimize(make(head))
    fast, counter = compile_counted(model)
    for batch, seqlen in SHAPES:
        inputs = {"input_ids": ids(batch, seqlen), "attention_mask": right_padded([seqlen] + [1] * (batch - 1))}
        assert_close(run(fast, **inputs), run(model, **inputs), atol=0)
    assert counter.frame_count <= 2 and is_fast(counter)


def test_one_note_at_a_time_compiles_twice():
    model = clinfast.optimize(make())
    fast, counter = compile_counted(model)
    for seqlen in (9, 17, 33, 2, 5, 64, 3, 21, 50, 40):
        run(fast, input_ids=ids(1, seqlen), attention_mask=right_padded([seqlen]))
    assert counter.frame_count <= 2


def test_one_compile_with_dynamic_shapes():
    fast, counter = compile_counted(clinfast.optimize(make()), dynamic=True)
    for batch, seqlen in SHAPES:
        run(fast, input_ids=ids(batch, seqlen))
    assert counter.frame_count == 1


def test_shapes_with_ones_compile_no_more_often_than_stock():
    shapes = [(1, 9), (3, 17), (1, 1), (7, 2), (5, 1), (2, 64)]
    model = make()
    stock = copy.deepcopy(model)
    counts = []
    for each in (clinfast.optimize(model), stock):
        fast, counter = compile_counted(each)
        for batch, seqlen in shapes:
            run(fast, input_ids=ids(batch, seqlen))
        counts.append(counter.frame_count)
    assert counts[0] <= counts[1]


def test_neither_calls_nor_masks_recompile():
    model = clinfast.optimize(make("token"))
    fast, counter = compile_counted(model)
    for seed in range(8):
        run(fast, input_ids=ids(3, 20, seed=seed), attention_mask=right_padded([20, 1 + seed, 20 - seed]))
        run(model, **INPUTS)
    assert counter.frame_count == 1


def test_the_packed_weights_are_shared():
    model = clinfast.optimize(make())
    before = registry.calls["linear.prepack[cpu]"]
    fast, _ = compile_counted(model)
    run(fast, **INPUTS)
    assert registry.calls["linear.prepack[cpu]"] == before and not compiled._made


def flip(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)


def flip_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(-0.7)


def load(model):
    other = copy.deepcopy(model)
    flip(other)
    model.load_state_dict(other.state_dict())


def load_assign(model):
    other = copy.deepcopy(model)
    flip(other)
    model.load_state_dict(other.state_dict(), assign=True)


def fused_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.3, fused=True).step()


@pytest.mark.parametrize("edit", [flip, flip_data, load, load_assign, fused_step])
@pytest.mark.parametrize("head", ["base", "sequence", "token"])
def test_weight_edits_after_compile_are_seen(head, edit):
    model = clinfast.optimize(make(head))
    fast, counter = compile_counted(model)
    before = run(fast, **INPUTS)
    edit(model)
    after = run(fast, **INPUTS)
    assert_close(after, run(copy.deepcopy(model), **INPUTS), mask=INPUTS["attention_mask"])
    assert any((before[name] - after[name]).abs().max() > 1e-2 for name in after)
    assert is_fast(counter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_after_compile(dtype):
    model = clinfast.optimize(make())
    fast, counter = compile_counted(model)
    run(fast, **INPUTS)
    model.to(dtype)
    out = run(fast, **INPUTS)
    assert all(value.dtype is dtype for value in out.values())
    # fp16 is not computed in on the CPU: stock runs, whole.
    assert is_fast(counter) == (dtype is torch.bfloat16)
    assert_close(out, run(copy.deepcopy(model).float(), **INPUTS), atol=0.3, mask=INPUTS["attention_mask"])
    model.float()
    assert_close(run(fast, **INPUTS), run(model, **INPUTS), atol=0)


@pytest.mark.parametrize("head", ["base", "sequence"])
@pytest.mark.parametrize("padding", ["remove", "keep"])
def test_left_padding_gives_what_stock_gives(head, padding):
    """An eager call goes to stock; a traced one cannot, and reads the padded column 0 as stock does."""
    model = clinfast.optimize(make(head), padding=padding)
    fast, counter = compile_counted(model)
    assert_close(run(fast, **INPUTS), run(model, **INPUTS), atol=0)
    expected = patch.stock_forward(model, **LEFT)
    out = run(fast, **LEFT)
    assert_close(out, dict(expected.items()), mask=LEFT["attention_mask"])
    assert counter.frame_count == 1


def test_a_note_without_tokens_is_finite():
    fast, _ = compile_counted(clinfast.optimize(make("sequence")))
    mask = right_padded([20, 0, 13])
    out = run(fast, input_ids=ids(3, 20), attention_mask=mask)
    assert out["logits"].isfinite().all()


def test_restore_after_compile():
    model = clinfast.optimize(make())
    fast, counter = compile_counted(model)
    ours = run(fast, **INPUTS)
    assert is_fast(counter)
    clinfast.restore(model)
    stock = run(fast, **INPUTS)
    assert ops_of(counter)[0] == []
    assert_close(stock, run(model, **INPUTS), atol=1e-6)
    assert_close(ours, stock, mask=INPUTS["attention_mask"])


def test_optimize_after_compile():
    model = make()
    fast, counter = compile_counted(model)
    run(fast, **INPUTS)
    assert ops_of(counter)[0] == []
    clinfast.optimize(model)
    assert_close(run(fast, **INPUTS), run(model, **INPUTS), atol=0)
    assert is_fast(counter)


def test_optimize_again_after_compile_with_other_options():
    model = clinfast.optimize(make())
    fast, counter = compile_counted(model)
    run(fast, **INPUTS)
    clinfast.optimize(clinfast.restore(model), precision="bf16")
    assert_close(run(fast, **INPUTS), run(model, **INPUTS), atol=0)
    assert is_fast(counter)


def test_module_compile():
    model = clinfast.optimize(make())
    counter = CompileCounterWithBackend("eager")
    expected = run(model, **INPUTS)
    model.compile(backend=counter, fullgraph=True)
    assert_close(run(model, **INPUTS), expected, atol=0)
    assert is_fast(counter)


def test_disabled_runs_stock_also_when_compiled():
    model = clinfast.optimize(make())
    fast, counter = compile_counted(model)
    run(fast, **INPUTS)
    assert is_fast(counter)
    with clinfast.disabled(model):
        run(fast, **INPUTS)
        assert ops_of(counter)[0] == []
    graphs = counter.frame_count
    run(fast, **INPUTS)
    assert counter.frame_count == graphs


def test_gradients_when_compiled():
    model = clinfast.optimize(make("sequence"))
    stock = copy.deepcopy(model)
    fast, _ = compile_counted(model, "aot_eager")
    labels = torch.tensor([0, 1, 0])
    fast(**INPUTS, labels=labels).loss.backward()
    stock(**INPUTS, labels=labels).loss.backward()
    for mine, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_grad_mode_runs_stock_and_inference_only_does_not():
    for options, fast_expected in (({}, False), ({"inference_only": True}, True)):
        torch._dynamo.reset()
        model = clinfast.optimize(make(), **options)
        fast, counter = compile_counted(model, "aot_eager")
        out = fast(**INPUTS)
        assert is_fast(counter) == fast_expected
        assert out.last_hidden_state.requires_grad != fast_expected


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_bad_ids_raise_and_the_next_call_works(backend):
    model = clinfast.optimize(make())
    fast, counter = compile_counted(model, backend)
    expected = run(fast, **INPUTS)
    for bad in (97, -1, 2**40):
        wrong = INPUTS["input_ids"].clone()
        wrong[1, 2] = bad
        with pytest.raises(IndexError, match=rf"\[1, 2\] is {bad}\b"):
            run(fast, input_ids=wrong, attention_mask=INPUTS["attention_mask"])
    assert_close(run(fast, **INPUTS), expected, atol=0)
    assert counter.frame_count == 1


def test_a_freed_model_is_let_go():
    model = clinfast.optimize(make())
    fast, _ = compile_counted(model)
    run(fast, **INPUTS)
    encoders = len(compiled._encoders)
    del model, fast
    torch._dynamo.reset()
    gc.collect()
    assert len(compiled._encoders) < encoders


def encode_arguments(head, **options):
    model = clinfast.optimize(make(head), **options)
    ((_, _, forward),) = patch.find_patched(model)
    weights = [ref.tensor().detach() for ref in forward.encoder.refs]
    return model, [INPUTS["input_ids"], INPUTS["attention_mask"], None, weights, forward.encoder.call]


@pytest.mark.parametrize("head", ["base", "no-pooler", "sequence", "token"])
def test_opcheck(head):
    _, arguments = encode_arguments(head)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.clinfast.encode.default, arguments, test_utils=tests)
    arguments[1], arguments[2] = None, INPUTS["input_ids"] % 2
    torch.library.opcheck(torch.ops.clinfast.encode.default, arguments, test_utils=tests)


def test_the_op_alone_packs_for_itself_and_stays_bounded():
    model, arguments = encode_arguments("base")
    expected = run(model, **INPUTS)
    clones = [[w.clone() for w in arguments[3]] for _ in range(compiled.KEPT + 2)]
    del model
    for weights in clones:
        for _ in range(2):
            before = registry.calls["linear.prepack[cpu]"]
            hidden, pooled = torch.ops.clinfast.encode(*arguments[:3], weights, arguments[4])
            assert torch.equal(hidden, expected["last_hidden_state"])
            assert torch.equal(pooled, expected["pooler_output"])
        assert registry.calls["linear.prepack[cpu]"] == before, "packed again"
    assert len(compiled._made) == compiled.KEPT
    weights[7].mul_(-1)
    assert not torch.equal(torch.ops.clinfast.encode(*arguments[:3], weights, arguments[4])[0], hidden)


def test_export_holds_the_stock_model():
    model = clinfast.optimize(make("sequence"))
    with torch.no_grad():
        program = torch.export.export(model, (), INPUTS, strict=False)
    assert not any("clinfast" in str(node.target) for node in program.graph.nodes)
    expected = patch.stock_forward(model, **INPUTS).logits
    torch.testing.assert_close(program.module()(**INPUTS).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ with g++, which is not here")
def test_inductor():
    model = clinfast.optimize(make())
    expected = run(model, **INPUTS)
    fast = torch.compile(model, fullgraph=True)
    assert_close(run(fast, **INPUTS), expected, atol=1e-5)
    assert_close(run(fast, **LEFT), run(model, **LEFT), mask=LEFT["attention_mask"])
    flip_data(model)
    assert_close(run(fast, **INPUTS), run(model, **INPUTS), atol=1e-5)
