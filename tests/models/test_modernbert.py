"""What only ModernBERT has: notes beyond its window, rotary tables, missing biases, pooling by the mean."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from bert_models import Subject, ids, right_padded, run, worst_error
from relatives import make
from transformers_version import FOUR, needs_five

import clinfast
from clinfast import models
from clinfast.engine import precision as precisions
from clinfast.engine.spec import Unsupported
from clinfast.ops import registry

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning")]

LONG = {"max_position_embeddings": 700, "local_attention": 128, "num_attention_heads": 1}


@pytest.fixture(scope="module")
def long_notes():
    """Notes longer than a window and a block of keys, beside a short one."""
    return {"input_ids": ids(3, 600), "attention_mask": right_padded([600, 7, 333])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["base", "sequence"])
def test_notes_longer_than_the_window(long_notes, head, dtype):
    s = Subject(make("modernbert", head, dtype=dtype, **LONG))
    before = registry.calls["encoder_layer[cpu]"] + registry.calls["attention_windowed[cpu]"]
    s.check(**long_notes)
    assert registry.calls["encoder_layer[cpu]"] + registry.calls["attention_windowed[cpu]"] > before


def test_op_by_op_has_the_bits_of_one_call(long_notes, monkeypatch):
    model = make("modernbert", **LONG)
    one_call = run(clinfast.optimize(copy.deepcopy(model)), **long_notes)
    monkeypatch.setenv("CLINFAST_BACKEND_GELU", "cpu")  # any override takes layers apart
    registry.implementation.cache_clear()
    before = registry.calls["attention_windowed[cpu]"], registry.calls["rotate[cpu]"]
    apart = run(clinfast.optimize(model), **long_notes)
    assert (registry.calls["attention_windowed[cpu]"], registry.calls["rotate[cpu]"]) > before
    assert torch.equal(one_call["last_hidden_state"], apart["last_hidden_state"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_note_has_the_same_bits_alone_and_behind_left_padding(long_notes, dtype):
    model = clinfast.optimize(make("modernbert", dtype=dtype, **LONG))
    together = run(model, **long_notes)["last_hidden_state"]
    for row, length in enumerate([600, 7, 333]):
        note = long_notes["input_ids"][row : row + 1, :length]
        assert torch.equal(run(model, input_ids=note)["last_hidden_state"], together[row : row + 1, :length])
        shifted = {
            "input_ids": torch.nn.functional.pad(note, (9, 0), value=1),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(note), (9, 0)),
        }
        assert torch.equal(run(model, **shifted)["last_hidden_state"][:, 9:], together[row : row + 1, :length])
    assert clinfast.report(model).calls_stock == 0


@pytest.mark.parametrize("padding", ["remove", "keep"])
@pytest.mark.parametrize("head", ["sequence"] if FOUR else ["sequence", "choice"])
def test_pooling_by_the_mean(head, padding):
    if FOUR and padding == "keep":
        pytest.skip("refused: test_kept_padding_is_refused_on_transformers_4")
    s = Subject(make("modernbert", head, classifier_pooling="mean"), padding=padding)
    if FOUR or head == "choice":  # where stock needs a mask for this
        shape = (64, 2, 24) if head == "choice" else (128, 24)
        batch = {"input_ids": ids(128, 24, seed=9).view(shape), "attention_mask": torch.ones(shape).long()}
        stock, exact = (run(model, **batch)["logits"] for model in (s.stock, s.exact))
        s._stock_errors = {"logits": worst_error(stock, exact)}
    for mask in (right_padded([20, 5, 1, 16]), right_padded([20, 5, 1, 16]).flip(1)):
        inputs = {"input_ids": ids(4, 20), "attention_mask": mask}
        s.check(**({k: v.view(2, 2, 20) for k, v in inputs.items()} if head == "choice" else inputs))


@pytest.mark.skipif(not FOUR, reason="from transformers 5 on a padded token that sees no key has a defined result")
def test_kept_padding_is_refused_on_transformers_4():
    with pytest.raises(Unsupported, match="padding='keep' is not served with a sliding window"):
        clinfast.optimize(make("modernbert"), padding="keep", strict=True)


def test_longer_than_the_tables_runs_stock():
    """Stock goes on turning; nothing is out of range there."""
    s = Subject(make("modernbert", max_position_embeddings=30))
    s.check(input_ids=ids(2, 30))
    s.check_stock(input_ids=ids(2, 31))
    assert "longer than config.max_position_embeddings" in str(clinfast.report(s.model).units[0].fallbacks)


def test_an_edited_window_runs_stock():
    s = Subject(make("modernbert"))
    for model in (s.model, s.stock):
        model.config.local_attention = 4
    s.check_stock(input_ids=ids(2, 20))


def test_edited_frequencies_are_noticed():
    s = Subject(make("modernbert"))
    s.check(input_ids=ids(2, 20))
    for model in (s.model, s.stock, s.exact):
        for name, buffer in model.named_buffers():
            if name.endswith("inv_freq") and "original" not in name:
                buffer.mul_(0.5)
    s._stock_errors = None
    s.check(input_ids=ids(2, 20))


def test_another_dtype_turns_with_the_frequencies_that_stock_has():
    """`.to(bfloat16)` rounds the buffer of stock, too."""
    s = Subject(make("modernbert", hidden_size=128))
    s.check(input_ids=ids(2, 24))
    for model in (s.model, s.stock):
        model.to(torch.bfloat16)
    s.exact, s._stock_errors = copy.deepcopy(s.stock).double(), None
    s.check(input_ids=ids(2, 24))


def test_fp32_weights_in_bf16(long_notes):
    s = Subject(make("modernbert", **LONG), precision="bf16", stock_dtype=torch.bfloat16)
    ours, stock, exact = (run(m, **long_notes)["last_hidden_state"] for m in (s.model, s.stock, s.exact))
    real = long_notes["attention_mask"].bool()
    assert ours.dtype is torch.float32
    assert (ours[real] - exact[real]).abs().max() <= 2 * (stock[real] - exact[real]).abs().max()


@needs_five
@pytest.mark.parametrize("mask", ["right", "holes", "left"])
def test_compiled(mask):
    """Every mask: a traced call cannot go back to stock."""
    model = make("modernbert", "sequence")
    masks = {
        "right": right_padded([20, 5]), "holes": torch.tensor([[1, 0, 1, 1, 0] * 4, [1] + [0] * 19]),
        "left": right_padded([20, 17]).flip(1),
    }  # fmt: skip
    inputs = {"input_ids": ids(2, 20), "attention_mask": masks[mask]}
    expected = run(model, **inputs)["logits"]
    clinfast.optimize(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = registry.calls["encoder_layer[cpu]"]
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert registry.calls["encoder_layer[cpu]"] > before


MEMORY = """
import resource, sys, torch
from relatives import make
import clinfast
torch.set_num_threads(1)
model = make("modernbert", max_position_embeddings=8192, local_attention=128, num_hidden_layers=3, vocab_size=97)
clinfast.optimize(model)
def grown(tokens):
    note = torch.randint(0, 97, (1, tokens))
    with torch.no_grad():
        model(input_ids=note)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
base, half, whole = grown(512), grown(4096), grown(8192)
assert clinfast.report(model).calls_stock == 0
print(half - base, whole - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_grows_linearly():
    """One score in fp32 for each pair of 8,192 tokens would be 256 MiB; eight times the tokens' activations are not."""
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120, env=environment
    )
    assert result.returncode == 0, result.stderr
    half, whole = map(int, result.stdout.split())
    assert whole < 64 << 20 and whole < 3 * max(half, 4 << 20)


REFUSED = [
    (lambda m: setattr(m.layers[1], "mlp_norm", torch.nn.Identity()), "layers.1.mlp_norm is"),
    (lambda m: setattr(m.layers[1], "attn_norm", torch.nn.Identity()), "layers.1.attn_norm is"),
    (lambda m: setattr(m.layers[0].mlp, "act", torch.nn.Mish()), "mlp.act is torch.nn.modules.activation.Mish"),
    (lambda m: setattr(m.layers[0].attn, "out_drop", torch.nn.ReLU()), "attn.out_drop is"),
    (lambda m: setattr(m.final_norm, "eps", 0.1), "final_norm.eps is 0.1"),
    (lambda m: setattr(m.layers[1].attn, "Wo", torch.nn.Linear(64, 64)), "attention_output has a bias in some layers"),
    (lambda m: m.layers.__delitem__(slice(None)), "layers is empty"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_refused_by_name(change, words):
    model = make("modernbert")
    change(model)
    with pytest.raises(Unsupported) as caught:
        models.match(model)
    assert words in str(caught.value)


@needs_five
def test_other_rotations_are_refused_by_name():
    kinds = {kind: {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0} for kind in KINDS}
    with pytest.raises(Unsupported, match=r"rotary_emb\.rope_type is .*'linear'.*; only 'default' is served"):
        models.match(make("modernbert", rope_parameters=kinds))
    model = make("modernbert")
    model.rotary_emb.full_attention_attention_scaling = 1.1
    with pytest.raises(Unsupported, match=r"full_attention_attention_scaling is 1\.1"):
        models.match(model)


KINDS = ("full_attention", "sliding_attention")


@needs_five
def test_layers_may_come_in_any_order():
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    s = Subject(make("modernbert", layer_types=kinds))
    s.check(input_ids=ids(3, 20), attention_mask=right_padded([20, 9, 1]))
    assert s.model.forward.match.encoder.windows == (4, -1, -1, 4)


def test_fp8_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(precisions, "resolve", lambda precision, dtype, device: torch.bfloat16)
    with pytest.raises(Unsupported, match="precision='fp8' is not served for modernbert"):
        clinfast.optimize(make("modernbert"), precision="fp8", strict=True)
