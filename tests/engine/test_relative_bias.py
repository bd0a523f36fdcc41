"""Biases by relative distance, which stock counts in columns, in every executor."""

import pytest
import torch
from bert_models import Subject, ids, right_padded, run
from engine_fakes import with_graphs
from relatives import make
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

import clinfast
from clinfast import forward, patch
from clinfast.engine.relative_bias import bucket_of, expanded
from clinfast.ops import registry

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning")]

# Notes beyond the distance that has a bucket of its own.
LONG = {"max_position_embeddings": 320}
LENGTHS = [300, 3, 150, 290]
SCATTERED = torch.rand(4, 300, generator=torch.Generator().manual_seed(0)) < 0.6
SCATTERED[:, 0] = True
MASKS = {
    "right": right_padded(LENGTHS),
    "left": right_padded(LENGTHS).flip(1),
    "holes": SCATTERED.long(),
    "a-gap": right_padded(LENGTHS) - torch.nn.functional.pad(right_padded([60, 0, 60, 60]), (40, 200)),
}


@pytest.mark.parametrize("distances", [torch.arange(-700, 701), torch.arange(-5, 6)[:, None]], ids=["all", "2-D"])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (40, 200), (8, 16)])
def test_buckets_are_stocks(distances, buckets, max_distance):
    expected = MPNetEncoder.relative_position_bucket(distances, buckets, max_distance)
    assert torch.equal(bucket_of(distances, buckets, max_distance), expected)
    assert expected.min() == 0 and (distances.ndim == 2 or expected.max() == buckets - 1)


def test_the_expanded_table_holds_stocks_bias_at_every_distance():
    encoder = make("mpnet", **LONG).encoder
    stock = encoder.compute_position_bias(torch.zeros(1, 300, 1))[0]
    table = expanded(encoder.relative_attention_bias.weight, 32, 128)
    distances = torch.arange(300)[None, :] - torch.arange(300)[:, None]
    assert torch.equal(table[:, distances.clamp(-128, 128) + 128], stock)


@pytest.mark.parametrize("mask", MASKS)
def test_graphs_pack_the_columns(mask):
    """The buffers of a graph know no batch: its columns are positions in what the caller gave."""
    subject = Subject(make("mpnet", "token", **LONG))
    driver, graphs = with_graphs(subject.model)
    for rows in (4, 2):
        subject.check(input_ids=ids(rows, 300), attention_mask=MASKS[mask][:rows])
    assert driver.replays == 2 and not graphs.op_by_op


@pytest.mark.skipif(not forward.COMPILES, reason=f"torch {torch.__version__} compiles the stock model")
@pytest.mark.parametrize("head", ["base", "sequence", "token"])
@pytest.mark.parametrize("mask", MASKS)
def test_compiled(mask, head):
    torch._dynamo.reset()
    model = clinfast.optimize(make("mpnet", head, **LONG))
    inputs = {"input_ids": ids(4, 300), "attention_mask": MASKS[mask]}
    fast = torch.compile(model, backend="eager", fullgraph=True)
    out, expected = run(fast, **inputs), patch.stock_forward(model, **inputs)
    for name, value in out.items():
        real = inputs["attention_mask"].bool() if value.dim() == 3 else slice(None)
        torch.testing.assert_close(value[real], expected[name][real], rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_which_attention_ran(monkeypatch):
    inputs = {"input_ids": ids(2, 9), "attention_mask": right_padded([9, 4])}
    model = clinfast.optimize(make("mpnet", "token"))
    run(model, **inputs)
    registry.calls.clear()
    run(model, **inputs)
    assert registry.calls["encoder_layer[cpu]"] == 2 or registry.calls["attention_biased[cpu]"] == 2
    assert not registry.calls["attention[cpu]"]


def test_the_stems_override_goes_for_the_variant(monkeypatch):
    monkeypatch.setenv("CLINFAST_BACKEND_ATTENTION", "torch")
    assert registry._override("attention_biased") == "torch" == registry._override("attention")
    monkeypatch.setenv("CLINFAST_BACKEND_ATTENTION_BIASED", "cpu")
    assert registry._override("attention_biased") == "cpu" and registry._override("attention") == "torch"
    assert registry._override("layer_norm") is None
