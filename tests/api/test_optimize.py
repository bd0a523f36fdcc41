"""The public functions: what they accept, what they refuse and how, and that they can be undone."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from bert_models import HEADS, Subject, assert_equal, ids, make, mapped, right_padded, run
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import clinfast
from clinfast import api, canary, patch
from clinfast.engine.encoder import Encoder
from clinfast.engine.spec import Unsupported

pytestmark = pytest.mark.usefixtures("one_thread")

INPUTS = {"input_ids": ids(3, 20), "attention_mask": right_padded([20, 7, 13])}


def is_stock(model):
    return not patch.find_patched(model) and not any("forward" in m.__dict__ for m in model.modules())


def test_returns_the_same_object_with_the_same_weights():
    model = make("sequence")
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    assert clinfast.optimize(model) is model
    for name, p in model.named_parameters():
        same, pointer, value = before[name]
        assert p is same and p.data_ptr() == pointer and torch.equal(p, value)


@pytest.mark.parametrize("head", HEADS)
def test_restore_gives_stock_back_to_the_bit(head):
    model = make(head)
    keys = set(model.__dict__)
    expected = run(model, **INPUTS)
    clinfast.optimize(model)
    run(model, **INPUTS)
    assert clinfast.restore(model) is model
    assert is_stock(model) and set(model.__dict__) == keys
    assert_equal(run(model, **INPUTS), expected)


def test_restore_is_idempotent_and_harmless_on_stock():
    model = make()
    clinfast.restore(model)
    clinfast.optimize(model)
    for _ in range(3):
        clinfast.restore(model)
    assert is_stock(model)
    clinfast.optimize(model)
    assert clinfast.report(model).units[0].calls_fast == 0


def test_optimize_twice():
    model = clinfast.optimize(make())
    with pytest.raises(ValueError, match=r"optimized already.*restore"):
        clinfast.optimize(model, precision="bf16")
    assert clinfast.report(model).units[0].facts["compute_dtype"] == "float32"
    Subject(clinfast.restore(model), precision="bf16", stock_dtype=torch.bfloat16).check(**INPUTS)


WRONG_OPTIONS = [
    ({"precision": "fp64"}, ValueError, ["'fp64'", "'auto'", "'fp32'", "'bf16'"]),
    ({"precision": torch.bfloat16}, ValueError, ["torch.bfloat16", "'bf16'"]),
    ({"precision": None}, ValueError, ["None", "'auto'"]),
    ({"precision": "fp16"}, Unsupported, ["'fp16'", "'fp32'", "'bf16'"]),
    ({"precision": "int8"}, Unsupported, ["'int8'", "'bf16'"]),
    ({"precision": "fp8"}, Unsupported, ["'fp8'", "'bf16'"]),
    ({"backend": "cuda"}, ValueError, ["'cuda'", "'auto'", "'cpu'", "'torch'"]),
    ({"backend": None}, ValueError, ["None", "'auto'"]),
    ({"padding": "drop"}, ValueError, ["'drop'", "'remove'", "'keep'"]),
    ({"padding": True}, ValueError, ["True", "'remove'"]),
    ({"weights": "release"}, Unsupported, ["'release'", "'keep'"]),
    ({"weights": "lend"}, ValueError, ["'lend'", "'keep'", "'release'"]),
    ({"reproducible": "yes"}, ValueError, ["'yes'", "None"]),
    ({"strict": "yes"}, ValueError, ["'yes'", "True"]),
    ({"inference_only": None}, ValueError, ["None", "True"]),
]


@pytest.mark.parametrize(("options", "error", "words"), WRONG_OPTIONS, ids=lambda value: str(value)[:40])
def test_a_wrong_option_is_named_with_what_would_work(options, error, words):
    model = make()
    with pytest.raises(error) as caught:
        clinfast.optimize(model, **options)
    (name,) = options
    assert all(word in str(caught.value) for word in [name, *words]), caught.value
    assert is_stock(model)
    clinfast.optimize(model)


def test_unknown_keyword_and_positional_options_are_refused():
    with pytest.raises(TypeError):
        clinfast.optimize(make(), speed="max")
    with pytest.raises(TypeError):
        clinfast.optimize(make(), "bf16")


@pytest.mark.parametrize(
    "target",
    [torch.nn.Linear(2, 2), GPT2Model(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9))],
    ids=["Linear", "GPT2Model"],
)
def test_nothing_to_optimize(target):
    with pytest.raises(ValueError, match=rf"nothing to optimize in {type(target).__name__}.*bert"):
        clinfast.optimize(target)


@pytest.mark.parametrize("target", [None, "bert-base-uncased", 3, {"model": 1}])
def test_not_a_model(target):
    with pytest.raises(TypeError, match=r"cannot be optimized; pass a"):
        clinfast.optimize(target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_dtype_that_is_not_computed_in(dtype):
    model = make(dtype=dtype)
    with pytest.raises(Unsupported, match=rf"{dtype}.*precision='fp32'"):
        clinfast.optimize(model)
    assert is_stock(model)
    s = Subject(model, precision="fp32", stock_dtype=torch.float32)
    ours = run(s.model, **INPUTS)
    mask = INPUTS["attention_mask"].bool()
    assert all(value.dtype is dtype for value in ours.values())
    difference = ours["last_hidden_state"][mask].double() - run(s.exact, **INPUTS)["last_hidden_state"][mask]
    assert difference.abs().max() < (2e-2 if dtype is torch.float16 else 2e-5)


def test_a_meta_model_is_left_alone():
    with torch.device("meta"):
        model = BertModel(BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2))
    with pytest.warns(clinfast.ClinfastWarning, match="meta device"):
        clinfast.optimize(model)


def test_a_refused_model_is_left_stock_with_the_reason():
    model = make(is_decoder=True)
    expected = run(model, **INPUTS)
    with pytest.warns(clinfast.ClinfastWarning, match=r"BertModel is left stock: .*is_decoder"):
        assert clinfast.optimize(model) is model
    assert_equal(run(model, **INPUTS), expected)
    report = clinfast.report(model)
    assert "is_decoder" in report.units[0].refused and "is_decoder" in str(report)
    with pytest.raises(ValueError, match=r"verify: .*not optimized.*is_decoder"):
        clinfast.verify(model, INPUTS)
    clinfast.restore(model)
    assert not clinfast.report(model).units


def test_strict_raises_where_a_part_would_stay_stock():
    model = make(is_decoder=True)
    with pytest.raises(Unsupported, match="is_decoder"):
        clinfast.optimize(model, strict=True)
    assert not clinfast.report(model).units and is_stock(model)


class Pair(torch.nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, **inputs):
        return [module(**inputs).last_hidden_state for module in (self.first, self.second)]


def test_every_encoder_of_a_larger_module_is_optimized():
    pair = Pair(make(seed=1), make("no-pooler", seed=2)).eval()
    with torch.no_grad():
        expected = pair(**INPUTS)
        clinfast.optimize(pair)
        ours = pair(**INPUTS)
    mask = INPUTS["attention_mask"].bool()
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine[mask], theirs[mask], rtol=0, atol=1e-4)
    report = clinfast.report(pair)
    assert [(unit.path, unit.calls_fast) for unit in report.units] == [("first", 1), ("second", 1)]
    assert report.calls_fast == 2
    clinfast.restore(pair.first)
    assert [unit.path for unit in clinfast.report(pair).units] == ["second"]
    with pytest.raises(ValueError, match="at 'second' is optimized already"):
        clinfast.optimize(pair)
    clinfast.restore(pair)
    assert is_stock(pair)


def test_nothing_is_left_behind_where_one_of_two_fails(monkeypatch):
    pair = Pair(make(seed=1), make(seed=2)).eval()
    check = canary.check

    def fail_at_the_second(module, match, encoder):
        if module is pair.second:
            raise RuntimeError("out of luck")
        return check(module, match, encoder)

    monkeypatch.setattr(canary, "check", fail_at_the_second)
    with pytest.raises(RuntimeError, match="out of luck"):
        clinfast.optimize(pair)
    assert is_stock(pair)


def test_one_good_and_one_refused_encoder():
    pair = Pair(make(seed=1), make(seed=2, is_decoder=True)).eval()
    with pytest.warns(clinfast.ClinfastWarning, match="at 'second' is left stock"):
        clinfast.optimize(pair)
    report = clinfast.report(pair)
    assert [unit.refused is None for unit in report.units] == [True, False]
    clinfast.restore(pair)
    with pytest.raises(Unsupported, match=r"second.*is_decoder"):
        clinfast.optimize(pair, strict=True)
    assert is_stock(pair)


@pytest.mark.parametrize("head", ["base", "sequence", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_canary_refuses_an_encoder_that_computes_something_else(head, dtype, monkeypatch):
    model = make(head, dtype=dtype)
    clean = Encoder.run

    def shifted(self, request):
        return mapped(clean(self, request), lambda x: x + 0.3 * x.abs().max())

    monkeypatch.setattr(Encoder, "run", shifted)
    with pytest.raises(Unsupported, match=r"differs from stock by \d.*beyond the budget of \d"):
        clinfast.optimize(model)
    assert is_stock(model)


@pytest.mark.parametrize("wrong", ["nan", "shape", "dtype", "missing"])
def test_canary_refuses_nan_and_other_shapes(wrong, monkeypatch):
    clean = Encoder.run

    def broken(self, request):
        out = clean(self, request)
        hidden = {
            "nan": out.hidden_states * float("nan"),
            "shape": out.hidden_states[:, 1:],
            "dtype": out.hidden_states.double(),
            "missing": None,
        }[wrong]
        return out._replace(hidden_states=hidden)

    monkeypatch.setattr(Encoder, "run", broken)
    with pytest.raises(Unsupported, match="last_hidden_state"):
        clinfast.optimize(make())


def test_canary_leaves_no_trace():
    model = make("sequence").train()
    model.bert.encoder.layer[0].eval()
    flags = [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    clinfast.optimize(model)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    report = clinfast.report(model)
    assert (report.calls_fast, report.calls_stock) == (0, 0)
    assert 0 <= report.units[0].canary_error < 1e-4


@pytest.mark.parametrize("fields", [{"max_position_embeddings": 1}, {"vocab_size": 1}, {"type_vocab_size": 1}], ids=str)
def test_the_smallest_tables(fields):
    model = clinfast.optimize(make(**fields))
    columns = min(6, model.config.max_position_embeddings)
    stock = copy.deepcopy(model)
    batch = ids(2, columns, vocab=model.config.vocab_size)
    ours, expected = run(model, input_ids=batch), run(stock, input_ids=batch)
    torch.testing.assert_close(ours["last_hidden_state"], expected["last_hidden_state"], rtol=0, atol=1e-4)


def test_disabled_nests():
    model = clinfast.optimize(make())
    with clinfast.disabled(model):
        with clinfast.disabled(model):
            run(model, **INPUTS)
        run(model, **INPUTS)
    run(model, **INPUTS)
    report = clinfast.report(model)
    assert (report.calls_fast, report.calls_stock) == (1, 2)
    assert report.fallbacks == {"inside disabled(model)": 2}


def test_disabled_ends_with_an_exception_and_gives_stock_to_the_bit():
    model = make()
    expected = run(model, **INPUTS)
    clinfast.optimize(model)
    with pytest.raises(KeyError), clinfast.disabled(model):
        assert_equal(run(model, **INPUTS), expected)
        raise KeyError
    run(model, **INPUTS)
    assert clinfast.report(model).calls_fast == 1


def test_restore_inside_disabled():
    model = clinfast.optimize(make())
    with clinfast.disabled(model):
        clinfast.restore(model)
    assert is_stock(model)
    clinfast.optimize(model)
    run(model, **INPUTS)
    assert clinfast.report(model).calls_fast == 1


@pytest.mark.parametrize("name", ["disabled", "refresh", "warmup", "verify"])
def test_functions_that_need_an_optimized_model_say_so(name):
    with pytest.raises(ValueError, match=rf"{name}: BertModel is not optimized.*clinfast.optimize"):
        if name == "disabled":
            with clinfast.disabled(make()):
                pass
        else:
            getattr(clinfast, name)(*([make(), INPUTS] if name == "verify" else [make()]))


@pytest.mark.parametrize("head", HEADS)
def test_warmup(head):
    model = clinfast.optimize(make(head))
    clinfast.warmup(model)
    clinfast.warmup(model, lengths=(1, 10**6, 0, 17))
    clinfast.warmup(model, lengths=[])
    report = clinfast.report(model)
    assert (report.calls_fast, report.calls_stock) == (0, 0)
    run(model, **INPUTS)


def test_disabled_by_environment(monkeypatch):
    model = make()
    expected = run(model, **INPUTS)
    clinfast.optimize(model)
    monkeypatch.setenv("CLINFAST_DISABLE", "1")
    assert_equal(run(model, **INPUTS), expected)
    monkeypatch.setenv("CLINFAST_DISABLE", "0")
    run(model, **INPUTS)
    report = clinfast.report(model)
    assert (report.calls_fast, report.calls_stock) == (1, 1)


def run_python(code, **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def test_a_backend_for_one_op_by_environment():
    code = (
        "from bert_models import *; from clinfast.ops import registry; s = Subject(make()); "
        "s.check(input_ids=ids(2, 9)); print(registry.calls['attention[torch]'], registry.calls['embedding[cpu]'])"
    )
    done = run_python(code, CLINFAST_BACKEND_ATTENTION="torch")
    assert done.returncode == 0, done.stderr
    assert [int(n) > 0 for n in done.stdout.split()] == [True, True]


def test_import_needs_neither_transformers_nor_dynamo():
    code = (
        "import sys, torch; before = set(sys.modules); import clinfast; new = set(sys.modules) - before; "
        "print([m for m in new if m.split('.')[0] in ('transformers', 'sentence_transformers', 'numpy')"
        " or m.startswith('torch._dynamo')])"
    )
    done = run_python(code)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


def test_without_compiled_kernels_everything_works_on_torch():
    code = (
        "import sys; sys.modules['clinfast._C'] = None\n"
        "from bert_models import *; import clinfast, pytest\n"
        "s = Subject(make()); s.check(input_ids=ids(3, 20), attention_mask=right_padded([20, 7, 13]))\n"
        "assert clinfast.info().backends['cpu'] != 'ready' and clinfast.info().isa == 'torch'; str(clinfast.info())\n"
        "assert 'torch' in str(clinfast.report(s.model))\n"
        "with pytest.raises(ValueError, match=\"backend='torch' works\"): clinfast.optimize(make(), backend='cpu')\n"
        "with torch.no_grad(): s.model.pooler.dense.weight.data.mul_(-2)\n"
        "s.exact.pooler.dense.weight.data.mul_(-2); s.stock.pooler.dense.weight.data.mul_(-2)\n"
        "s.check(input_ids=ids(3, 20))\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_info():
    info = clinfast.info()
    assert info.isa in info.isas and info.backends["torch"] == "ready"
    assert info.threads == torch.get_num_threads() and info.cores >= 1
    assert info.versions["torch"] == torch.__version__
    text = str(info)
    assert info.isa in text and torch.__version__ in text and info.cpu in text


def test_public_names():
    assert set(clinfast.__all__) <= set(dir(clinfast))
    for name in ("optimize", "restore", "disabled", "refresh", "warmup", "report", "verify", "info"):
        assert getattr(clinfast, name) is getattr(api, name) and getattr(clinfast, name).__doc__


def test_a_pickle_of_the_warning_and_error_classes():
    for cls in (clinfast.ClinfastWarning, clinfast.StrictError, Unsupported):
        assert str(pickle.loads(pickle.dumps(cls("text")))) == "text"
