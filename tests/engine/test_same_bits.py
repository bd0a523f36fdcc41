"""A note's output has the same bits alone, in any batch, in any order and under any padding."""

import copy

import pytest
import torch
from bert_models import ids, make, right_padded, run
from relatives import make as relative

import clinfast

LENGTHS = [40, 1, 17, 64, 2, 33, 16, 31]
DTYPES = [torch.float32, torch.bfloat16]
HEADS = ["base", "no-pooler", "sequence", "token"]
REAL = {
    "bert-base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "minilm": {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
}


def notes(lengths, seed=0):
    return [ids(1, length, seed=seed + i)[0] for i, length in enumerate(lengths)]


def padded(chosen, seqlen=None, filler=0):
    lengths = [len(note) for note in chosen]
    mask = right_padded(lengths, seqlen)
    batch = torch.full(mask.shape, filler)
    for row, note in enumerate(chosen):
        batch[row, : len(note)] = note
    return {"input_ids": batch, "attention_mask": mask}


def rows(outputs, chosen):
    """What each note got, cut to its own length."""
    found = []
    for i, note in enumerate(chosen):
        found.append({n: x[i, : len(note)] if x.dim() == 3 else x[i] for n, x in outputs.items()})
    return found


def assert_same(found, expected):
    for i, (ours, alone) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == alone.keys()
        for name in ours:
            assert torch.equal(ours[name], alone[name]), f"note {i}: {name} has other bits"


def check(model, chosen):
    if not clinfast.report(model).units[0].facts["reproducible"]:
        pytest.skip("the linears of this machine give a row other bits in another batch, and report says so")
    alone = [rows(run(model, input_ids=note[None]), [note])[0] for note in chosen]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(3)).tolist()
    shuffled = [chosen[i] for i in order]
    for arranged, expected, arguments in (
        (chosen, alone, {}),
        (chosen, alone, {"seqlen": max(map(len, chosen)) + 9, "filler": 5}),
        (shuffled, [alone[i] for i in order], {}),
        (chosen[1:4], alone[1:4], {}),
        (chosen * 2, alone * 2, {}),
    ):
        batch = padded(arranged, **arguments)
        assert_same(rows(run(model, **batch), arranged), expected)
        assert_same(rows(run(model, **{k: v.int() for k, v in batch.items()}), arranged), expected)
    report = clinfast.report(model)
    assert report.calls_stock == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_small_models(head, dtype, thread_count):
    check(clinfast.optimize(make(head, dtype=dtype, max_position_embeddings=96)), notes(LENGTHS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fields", [{"hidden_size": 60, "num_attention_heads": 3}, {"hidden_size": 512}], ids=str)
def test_other_widths(fields, dtype, thread_count):
    model = make("base", dtype=dtype, max_position_embeddings=96, **fields)
    check(clinfast.optimize(model), notes(LENGTHS[:5]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", REAL)
def test_real_widths(size, dtype, thread_count):
    base = make("base", dtype=dtype, num_hidden_layers=1, max_position_embeddings=512, **REAL[size])
    check(clinfast.optimize(base), notes([128, 1, 300, 17]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["albert", "megatron-bert", "mpnet"])
@pytest.mark.parametrize("head", ["base", "sequence"])
def test_shared_and_pre_norm_layers_at_real_width(head, family, dtype, thread_count):
    """The pruned last layer takes its queries from a norm of one row a note, or from queries of all rows."""
    model = relative(family, head, dtype=dtype, max_position_embeddings=320, **REAL["bert-base"])
    check(clinfast.optimize(model), notes([128, 1, 300, 17]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_classifier_at_real_width(dtype, thread_count):
    """The pooler and the pruned last layer see one row a note: one row alone, many in a batch."""
    model = make("sequence", dtype=dtype, num_hidden_layers=2, num_labels=5, **REAL["bert-base"])
    check(clinfast.optimize(model), notes([50, 1, 2, 31], seed=8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_one_slice_of_the_ffn(dtype, thread_count):
    """2,049 packed rows are cut into slices, the last of them one row."""
    model = clinfast.optimize(make("no-pooler", dtype=dtype, num_hidden_layers=1, max_position_embeddings=544))
    lengths = [512, 512, 512, 512, 1]
    assert sum(lengths) == 2049
    check(model, notes(lengths))


@pytest.mark.parametrize("dtype", DTYPES)
def test_holes_and_left_padding(dtype):
    model = clinfast.optimize(make("no-pooler", dtype=dtype))
    batch = ids(3, 32)
    mask = torch.flip(right_padded([32, 9, 20]), [1])
    mask[2, ::2] = 0
    together = run(model, input_ids=batch, attention_mask=mask)["last_hidden_state"]
    for row in range(3):
        alone = run(model, input_ids=batch[row : row + 1], attention_mask=mask[row : row + 1])
        assert torch.equal(together[row], alone["last_hidden_state"][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_keep_gives_real_tokens_the_same_bits(dtype):
    kept = clinfast.optimize(make("base", dtype=dtype), padding="keep")
    removed = clinfast.optimize(make("base", dtype=dtype), padding="remove")
    chosen = notes([40, 1, 17, 33])
    batch = padded(chosen)
    assert_same(rows(run(kept, **batch), chosen), rows(run(removed, **batch), chosen))


def test_repacked_weights_give_the_same_bits():
    model = clinfast.optimize(make("base"))
    batch = padded(notes(LENGTHS))
    first = run(model, **batch)
    clinfast.refresh(model)
    again = run(model, **batch)
    copied = run(clinfast.optimize(copy.deepcopy(model)), **batch)
    for name in first:
        assert torch.equal(first[name], again[name]) and torch.equal(first[name], copied[name])


def test_a_machine_without_the_promise_is_reported_and_refused_on_demand(monkeypatch):
    from clinfast.engine import reproducibility
    from clinfast.engine.spec import Unsupported

    monkeypatch.setattr(reproducibility, "proved", lambda linears, device: False)
    model = clinfast.optimize(make())
    assert "not proved" in str(clinfast.report(model))
    with pytest.raises(Unsupported, match="reproducible=None"):
        clinfast.optimize(make(), reproducible=True)


def test_the_trial_sees_a_linear_whose_rows_depend_on_each_other():
    from clinfast.engine import reproducibility

    class Leaky:
        library, dtype, in_features, out_features = "leaky", torch.float32, 8, 8

        def __call__(self, x):
            return x + x.shape[0]

    assert not reproducibility.proved([Leaky()], torch.device("cpu"))
