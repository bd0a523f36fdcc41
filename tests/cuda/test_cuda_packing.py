import pytest
import torch
from helpers import offset_view
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_packing import LAYOUTS, TYPES, VOCAB, assert_packs_alike, laid_out, unpack_case

from clinfast.backends.cuda import native
from clinfast.backends.cuda.packing import pack, pack_into, position_ids, unpack, unpack_prechecked
from clinfast.ops import packing as op

DTYPES = list(native.DTYPES)
MASKS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
any_batch = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_pack(machine, ids, mask, types, keep_padding, sizes=(VOCAB, TYPES)):
    ours = machine(pack, ids, mask, types, *sizes, keep_padding)
    assert_packs_alike(ours, op.pack_reference(ids, mask, types, *sizes, keep_padding))
    return ours


@any_batch
@given(
    batch=st.integers(0, 5),
    seqlen=st.integers(0, 40),
    keep=st.floats(0, 1),
    mask_dtype=st.sampled_from([None, *MASKS]),
    wide=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    keep_padding=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pack_any_batch(machine, batch, seqlen, keep, mask_dtype, wide, layout, keep_padding, seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, VOCAB + 1, (batch, seqlen), generator=g)
    types = torch.randint(-1, TYPES + 1, (batch, seqlen), generator=g)
    mask = None if mask_dtype is None else (torch.rand(batch, seqlen, generator=g) < keep).to(mask_dtype)
    if mask is not None and mask_dtype not in (torch.bool, torch.uint8):
        mask *= torch.randint(0, 2, mask.shape, generator=g).to(mask_dtype) * 2 - 1
    if not wide:
        ids, types = ids.int(), types.int()
    mask = mask if mask is None else laid_out(mask, layout, 1)
    check_pack(machine, laid_out(ids, layout, 0), mask, laid_out(types, layout, 0) if seed % 2 else None, keep_padding)


@pytest.mark.parametrize("keep_padding", [False, True])
@pytest.mark.parametrize("seqlen", [255, 256, 257, 700])
def test_pack_rows_longer_than_a_block(machine, seqlen, keep_padding):
    ids = torch.zeros(3, seqlen, dtype=torch.int64)
    ids[2, seqlen - 1] = VOCAB
    mask = torch.rand(3, seqlen, generator=torch.Generator().manual_seed(seqlen)) < 0.6
    mask[1] = False
    ours = check_pack(machine, ids, mask, None, keep_padding)
    assert dict(zip(op.FACTS, ours[3].tolist(), strict=True))["bad_id_at"] == 3 * seqlen - 1


def test_pack_more_notes_than_a_block_has_threads(machine):
    ids = torch.zeros(300, 3, dtype=torch.int32)
    check_pack(machine, ids, torch.arange(900).view(300, 3) % 7 < 4, None, False)


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**40, -(2**63)])
def test_pack_finds_the_first_id_out_of_range(machine, bad):
    for where in (0, 5, 119):
        ids = torch.zeros(3, 40, dtype=torch.int64)
        ids.view(-1)[where:] = bad
        facts = machine(pack, ids, torch.zeros(3, 40, dtype=torch.bool), ids, VOCAB, TYPES)[3].tolist()
        assert facts == [0, 0, 3, where, where, 0]


@any_batch
@given(
    batch=st.integers(0, 5),
    seqlen=st.integers(0, 40),
    hidden=st.integers(0, 90),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    keep_padding=st.booleans(),
    exact_indices=st.booleans(),
)
def test_unpack_any_batch(machine, batch, seqlen, hidden, dtypes, keep_padding, exact_indices):
    packed, indices = unpack_case(batch, seqlen, hidden, dtypes[0], keep_padding)
    indices = indices[: len(packed)] if exact_indices else indices
    expected = op.unpack_reference(packed, indices, batch * seqlen, dtypes[1])
    assert torch.equal(machine(unpack, packed, indices, batch * seqlen, dtypes[1]), expected)
    assert torch.equal(machine(unpack, offset_view(packed), indices, batch * seqlen, dtypes[1]), expected)


def test_unpack_leaves_out_an_index_outside(machine):
    packed, indices = torch.ones(3, 4), torch.tensor([1, 0, 2], dtype=torch.int32)
    for bad in (-1, 12, 2**31 - 1):
        indices[1] = bad
        ours = machine(unpack_prechecked, packed, indices, 12, torch.float32)
        with pytest.raises(IndexError, match=rf"indices\[1\] is {bad}; it must lie within the 12 positions"):
            machine(unpack, packed, indices, 12, torch.float32)
        assert ours.sum(1).nonzero().flatten().tolist() == [1, 2]


@any_batch
@given(
    batch=st.integers(0, 5),
    seqlen=st.integers(0, 40),
    padding_idx=st.integers(0, 3),
    wide=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)
def test_position_ids_of_any_batch(machine, batch, seqlen, padding_idx, wide, layout, seed):
    ids = torch.randint(0, 4, (batch, seqlen), generator=torch.Generator().manual_seed(seed))
    ids = laid_out(ids if wide else ids.int(), layout, 1)
    ours = machine(position_ids, ids, padding_idx)
    assert ours.dtype is torch.int32 and torch.equal(ours, op.position_ids_reference(ids, padding_idx))


def test_position_ids_of_rows_longer_than_a_block(machine):
    ids = torch.randint(0, 3, (2, 700), generator=torch.Generator().manual_seed(1))
    assert torch.equal(machine(position_ids, ids, 1), op.position_ids_reference(ids, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(3, 5)}, "input_ids has dtype torch.float32"),
        ({"input_ids": torch.zeros(15, dtype=torch.int64)}, "input_ids has shape"),
        ({"attention_mask": torch.ones(3, 4, dtype=torch.int64)}, "attention_mask has shape"),
        ({"attention_mask": torch.ones(3, 5)}, "attention_mask has dtype torch.float32"),
        ({"token_type_ids": torch.zeros(5, 3, dtype=torch.int64)}, "token_type_ids has shape"),
        ({"vocab_size": -1}, "vocab_size is -1"),
    ],
)
def test_pack_names_bad_arguments(machine, change, message):
    ids = torch.zeros(3, 5, dtype=torch.int64)
    args = {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids, "vocab_size": 3, "type_vocab_size": 2}
    machine(pack, **args)
    with pytest.raises(ValueError, match=message):
        machine(pack, **{**args, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.ones(2, 6, dtype=torch.float64)}, "packed has dtype"),
        ({"packed": torch.ones(6, 2).t()}, "packed has strides"),
        ({"indices": torch.tensor([1, 4])}, "indices is .* torch.int64"),
        ({"indices": torch.tensor([1], dtype=torch.int32)}, "at least 2 entries"),
        ({"positions": -1}, "positions is -1"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
    ],
)
def test_unpack_names_bad_arguments(machine, change, message):
    indices = torch.tensor([1, 4], dtype=torch.int32)
    args = {"packed": torch.ones(2, 6), "indices": indices, "positions": 15, "dtype": torch.float32}
    machine(unpack, **args)
    with pytest.raises(ValueError, match=message):
        machine(unpack, **{**args, **change})


def buffers_of(machine, rows, notes):
    """Filled with what no batch brings, but within the tables: rows past the batch's keep it."""
    found = op.PackedBuffers.of(rows, notes, torch.device(machine.device))
    for name in ("input_ids", "token_type_ids", "position_ids", "indices"):
        getattr(found, name).fill_(1)
    return found


def check_pack_into(machine, ids, mask, types, constants, notes, spare=5):
    from clinfast.backends import torch as stock

    rows = ids.numel() + spare
    ours, expected = buffers_of(machine, rows, notes), op.PackedBuffers.of(rows, notes, torch.device("cpu"))
    before = [t.clone() for t in ours]
    pack_into(*map(machine.there, (ids, mask, types)), constants, rows, notes, ours)
    stock.pack_into(ids, mask, types, constants, rows, notes, expected)
    tokens = int(expected.facts[0])
    for name, a, old, b in zip(expected._fields, ours, before, expected, strict=True):
        a, old = a.cpu(), old.cpu()
        size = tokens if name in ("input_ids", "token_type_ids", "position_ids", "indices") else len(b)
        assert torch.equal(a[:size], b[:size]), name
        assert torch.equal(a[size:], old[size:]), f"{name} past the batch's rows"


@any_batch
@given(
    batch=st.integers(1, 5),
    seqlen=st.integers(1, 40),
    keep=st.floats(0, 1),
    mask_dtype=st.sampled_from([None, *MASKS]),
    wide=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    keep_padding=st.booleans(),
    counted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pack_into_any_batch(machine, batch, seqlen, keep, mask_dtype, wide, layout, keep_padding, counted, seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, VOCAB + 1, (batch, seqlen), generator=g)
    types = torch.randint(-1, TYPES + 1, (batch, seqlen), generator=g)
    mask = None if mask_dtype is None else (torch.rand(batch, seqlen, generator=g) < keep).to(mask_dtype)
    if not wide:
        ids, types = ids.int(), types.int()
    constants = op.PackInto(VOCAB, TYPES, 2, 1 if counted else None, keep_padding)
    mask = mask if mask is None else laid_out(mask, layout, 1)
    types = laid_out(types, layout, 0) if seed % 2 else None
    check_pack_into(machine, laid_out(ids, layout, 0), mask, types, constants, notes=8)


@pytest.mark.parametrize("keep_padding", [False, True])
@pytest.mark.parametrize(("batch", "seqlen"), [(1, 700), (3, 257), (300, 3), (17, 512)])
def test_pack_into_more_than_a_block_and_than_one_launch(machine, batch, seqlen, keep_padding):
    """The last one is beyond what one launch packs."""
    g = torch.Generator().manual_seed(seqlen)
    ids = torch.randint(0, VOCAB, (batch, seqlen), generator=g)
    ids[batch - 1, seqlen - 1] = VOCAB
    mask = torch.rand(batch, seqlen, generator=g) < 0.6
    for counted in (None, 1):
        constants = op.PackInto(VOCAB, 0, 0, counted, keep_padding)
        check_pack_into(machine, ids, mask, None, constants, notes=512 if batch > 32 else 32)


def test_pack_into_writes_nothing_past_its_rows(machine):
    """A mask that changed since its tokens were counted, by another stream, must not reach what lies behind."""
    ids = torch.zeros(2, 30, dtype=torch.int64)
    ours = buffers_of(machine, 60, 4)
    pack_into(machine.there(ids), None, None, op.PackInto(VOCAB, TYPES, 0, None, False), 16, 4, ours)
    for name in ("input_ids", "token_type_ids", "position_ids", "indices"):
        assert (getattr(ours, name)[16:] == 1).all(), name
