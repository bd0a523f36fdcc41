import pytest
import torch
from helpers import SENTINEL, offset_view, opcheck, threads
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from clinfast.backends import torch as torch_backend
from clinfast.backends.cpu import native
from clinfast.backends.cpu.packing import pack as compiled_pack
from clinfast.backends.cpu.packing import position_ids as compiled_position_ids
from clinfast.backends.cpu.packing import unpack as compiled_unpack
from clinfast.ops import packing as op

VOCAB, TYPES = 50, 2
DTYPES = [torch.float32, torch.bfloat16]
MASK_DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
LAYOUTS = ["contiguous", "transposed", "strided", "offset"]
any_isa = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def laid_out(x, layout, filler):
    """The same values with other strides, in a buffer of `filler`s that would show in the result."""
    if layout == "contiguous":
        return x
    if layout == "transposed":
        return x.t().contiguous().t()
    rows, columns = x.shape
    big = torch.full((2 * rows + 1, 3 * columns + 2), filler, dtype=x.dtype)
    view = big[1::2, 2::3] if layout == "strided" else big[1 : rows + 1, 1 : columns + 1]
    return view.copy_(x)


def assert_packs_alike(ours, expected):
    cu_seqlens, indices, seqused_k, facts = ours
    assert facts.tolist() == expected[3].tolist()
    tokens = int(facts[0])
    assert [t.dtype for t in ours] == [torch.int32] * 3 + [torch.int64]
    assert cu_seqlens.tolist() == expected[0].tolist()
    assert indices.shape == expected[1].shape
    assert indices[:tokens].tolist() == expected[1][:tokens].tolist()
    assert seqused_k.tolist() == expected[2].tolist()


def check_pack(*args):
    expected = op.pack_reference(*args)
    assert_packs_alike(compiled_pack(*args), expected)
    assert_packs_alike(torch_backend.pack(*args), expected)


@any_isa
@given(data=st.data())
def test_pack_any_batch(isa, data):
    batch, seqlen = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 70))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    layout = data.draw(st.sampled_from(LAYOUTS))
    ids = torch.randint(
        0, VOCAB, (batch, seqlen), generator=g, dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))
    )
    types = torch.randint(0, TYPES, (batch, seqlen), generator=g) if data.draw(st.booleans()) else None
    kind = data.draw(st.sampled_from(["none", "right", "left", "holes", "zero row"]))
    mask = None
    if kind != "none":
        lengths = torch.randint(0, seqlen + 1, (batch, 1), generator=g)
        column = torch.arange(seqlen)
        kept = {
            "right": column < lengths,
            "left": column >= lengths,
            "holes": torch.rand(batch, seqlen, generator=g) < 0.6,
            "zero row": (torch.arange(batch)[:, None] % 2 == 1).expand(batch, seqlen),
        }[kind]
        dtype = data.draw(st.sampled_from(MASK_DTYPES))
        # Any value but zero means real; a byte taken from an int64 of 256 would be zero.
        value = data.draw(st.sampled_from([1, 2, -1, 256])) if dtype in (torch.int32, torch.int64) else 1
        mask = laid_out((kept * value).to(dtype), layout, 1)
    args = (laid_out(ids, layout, VOCAB), mask, None if types is None else laid_out(types, layout, -1))
    check_pack(*args, VOCAB, TYPES, data.draw(st.booleans()))


@any_isa
@given(
    where=st.integers(0, 3 * 40 - 1),
    bad=st.sampled_from([-1, VOCAB, 2**31 - 1, -(2**31)]),
    wide=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
@example(where=0, bad=2**40, wide=True, layout="contiguous")
@example(where=119, bad=-(2**63), wide=True, layout="strided")
def test_pack_finds_the_first_value_out_of_range(isa, where, bad, wide, layout):
    ids = torch.zeros(3, 40, dtype=torch.int64 if wide else torch.int32)
    ids.view(-1)[where] = bad
    ids.view(-1)[where + 1 :] = VOCAB - 1
    # Padded positions are looked at too: stock reads their rows as well.
    mask = torch.zeros(3, 40, dtype=torch.bool)
    facts = dict(
        zip(
            op.FACTS,
            compiled_pack(laid_out(ids, layout, 0), mask, None, VOCAB, TYPES)[3].tolist(),
            strict=True,
        )
    )
    assert facts["bad_id_at"] == where and facts["bad_type_at"] == -1
    types = (ids == bad).to(ids.dtype) * (bad if bad != VOCAB else TYPES)
    check_pack(torch.zeros_like(ids), None, laid_out(types, layout, 0), VOCAB, TYPES)
    check_pack(laid_out(ids, layout, 0), None, types, VOCAB, TYPES)


def test_pack_empty_tables_hold_no_id():
    ids = torch.zeros(1, 3, dtype=torch.int64)
    assert compiled_pack(ids, None, ids, 0, 0)[3].tolist() == [3, 3, 0, 0, 0, -1]


def test_pack_a_broadcast_mask_and_a_large_batch(isa):
    ids = torch.randint(0, VOCAB, (32, 512))
    check_pack(ids, (torch.arange(512) < 100).expand(32, 512), None, VOCAB, TYPES)
    lengths = torch.randint(1, 513, (32, 1))
    check_pack(ids, (torch.arange(512) < lengths).long(), torch.zeros_like(ids), VOCAB, TYPES)


def test_pack_writes_nothing_outside_the_results(isa):
    ids = torch.zeros(3, 5, dtype=torch.int64)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    for keep_padding in (False, True):
        buffers = [torch.full((n + 2,), 777, dtype=torch.int32) for n in (4, 15, 3)]
        facts = torch.full((8,), 777)
        starts = [buffer[1:].data_ptr() for buffer in buffers]
        native.kernels().pack(
            mask.data_ptr(), ids.data_ptr(), 0, 5, 1, 5, 1, 0, 0, 8, 0, 8, 3, 5, VOCAB, TYPES, keep_padding,
            *starts, facts[1:].data_ptr(),
        )  # fmt: skip
        for buffer in (*buffers, facts):
            assert buffer[0] == 777 and buffer[-1] == 777
        ours = (*(buffer[1:-1] for buffer in buffers), facts[1:-1])
        assert_packs_alike(ours, op.pack_reference(ids, mask, None, VOCAB, TYPES, keep_padding))


def unpack_case(batch, seqlen, hidden, dtype, keep_padding=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, seqlen, generator=g) < 0.5
    ids = torch.zeros(batch, seqlen, dtype=torch.int64)
    _, indices, _, facts = op.pack_reference(ids, mask, None, VOCAB, TYPES, keep_padding)
    return torch.randn(int(facts[0]), hidden, generator=g).to(dtype), indices


@any_isa
@given(
    batch=st.integers(0, 5),
    seqlen=st.integers(0, 40),
    hidden=st.integers(0, 90),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    keep_padding=st.booleans(),
    exact_indices=st.booleans(),
)
def test_unpack_any_batch(isa, batch, seqlen, hidden, dtypes, keep_padding, exact_indices):
    packed, indices = unpack_case(batch, seqlen, hidden, dtypes[0], keep_padding)
    indices = indices[: len(packed)] if exact_indices else indices
    expected = op.unpack_reference(packed, indices, batch * seqlen, dtypes[1])
    for backend in (compiled_unpack, torch_backend.unpack):
        assert torch.equal(backend(packed, indices, batch * seqlen, dtypes[1]), expected)
    assert torch.equal(compiled_unpack(offset_view(packed), indices, batch * seqlen, dtypes[1]), expected)


@pytest.mark.parametrize("keep_padding", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_large_on_any_number_of_threads(isa, dtype, keep_padding):
    packed, indices = unpack_case(9, 130, 384, dtype, keep_padding)
    expected = op.unpack_reference(packed, indices, 9 * 130, torch.float32)
    for count in (1, 2):
        with threads(count):
            assert torch.equal(compiled_unpack(packed, indices, 9 * 130, torch.float32), expected)


def test_unpack_writes_nothing_outside_the_result(isa):
    packed, indices = unpack_case(2, 9, 21, torch.float32)
    big = torch.full((20, 27), SENTINEL)
    out = big[1:-1, 3:-3]
    native.kernels().unpack(packed.data_ptr(), out.data_ptr(), indices.data_ptr(), 21, 27, len(packed), 18, 21, 0, 0, 2)
    assert torch.equal(out, op.unpack_reference(packed, indices, 18, torch.float32))
    out.fill_(SENTINEL)
    assert (big == SENTINEL).all()


@pytest.mark.parametrize("bad", [-1, 12, 2**31 - 1])
@pytest.mark.parametrize("backend", [op.unpack, torch_backend.unpack])
def test_unpack_refuses_an_index_outside(backend, bad):
    packed = torch.ones(3, 4)
    with pytest.raises(IndexError):
        backend(packed, torch.tensor([1, bad, 2], dtype=torch.int32), 12, torch.float32)


@any_isa
@given(
    batch=st.integers(0, 5),
    seqlen=st.integers(0, 40),
    padding_idx=st.integers(0, 3),
    wide=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)
def test_position_ids_of_any_batch(isa, batch, seqlen, padding_idx, wide, layout, seed):
    ids = torch.randint(0, 4, (batch, seqlen), generator=torch.Generator().manual_seed(seed))
    ids = laid_out(ids if wide else ids.int(), layout, 1)
    expected = op.position_ids_reference(ids, padding_idx)
    for backend in (compiled_position_ids, torch_backend.position_ids):
        ours = backend(ids, padding_idx)
        assert ours.dtype is torch.int32 and torch.equal(ours, expected)


def test_position_ids_are_robertas():
    from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

    ids = torch.tensor([[0, 5, 1, 6, 2, 1, 1], [1, 1, 0, 9, 9, 2, 1]])
    theirs = RobertaEmbeddings.create_position_ids_from_input_ids(ids, 1)
    assert torch.equal(op.position_ids(ids, 1), theirs.int())


@pytest.mark.parametrize(
    ("ids", "padding_idx", "message"),
    [
        (torch.zeros(2, 3), 1, "input_ids has dtype"),
        (torch.zeros(6, dtype=torch.int64), 1, "input_ids has shape"),
        (torch.zeros(2, 3, dtype=torch.int64), -1, "padding_idx is -1"),
        (torch.zeros(2, 3, dtype=torch.int64), 2**31 - 1, "padding_idx is 2147483647"),
    ],
)
def test_position_ids_names_bad_arguments(ids, padding_idx, message):
    with pytest.raises(ValueError, match=message):
        op.position_ids(ids, padding_idx)


def test_opcheck():
    opcheck("position_ids", (torch.tensor([[0, 5, 1], [1, 1, 7]]), 1))
    ids = torch.zeros(3, 5, dtype=torch.int64)
    opcheck("pack", (ids, ids, None, VOCAB, TYPES))
    opcheck("pack", (ids.int(), None, ids, VOCAB, TYPES, True))
    opcheck("unpack", (torch.ones(2, 6), torch.tensor([1, 4], dtype=torch.int32), 15, torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(3, 5)}, "input_ids has dtype torch.float32"),
        ({"input_ids": torch.zeros(15, dtype=torch.int64)}, "input_ids has shape"),
        ({"attention_mask": torch.ones(3, 4, dtype=torch.int64)}, "attention_mask has shape"),
        ({"attention_mask": torch.ones(3, 5)}, "attention_mask has dtype torch.float32"),
        ({"token_type_ids": torch.zeros(5, 3, dtype=torch.int64)}, "token_type_ids has shape"),
        ({"token_type_ids": torch.zeros(3, 5, dtype=torch.bool)}, "token_type_ids has dtype"),
        ({"vocab_size": -1}, "vocab_size is -1"),
    ],
)
def test_pack_names_bad_arguments(change, message):
    ids = torch.zeros(3, 5, dtype=torch.int64)
    args = {
        "input_ids": ids,
        "attention_mask": ids,
        "token_type_ids": ids,
        "vocab_size": 3,
        "type_vocab_size": 2,
    }
    op.pack(**args)
    with pytest.raises(ValueError, match=message):
        op.pack(**{**args, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.ones(2, 6, dtype=torch.float64)}, "packed has dtype"),
        ({"packed": torch.ones(6, 2).t()}, "packed has strides"),
        ({"packed": torch.ones(2)}, "packed has shape"),
        ({"indices": torch.tensor([1, 4])}, "indices is .* torch.int64"),
        ({"indices": torch.tensor([1], dtype=torch.int32)}, "at least 2 entries"),
        ({"positions": -1}, "positions is -1"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
    ],
)
def test_unpack_names_bad_arguments(change, message):
    args = {
        "packed": torch.ones(2, 6),
        "indices": torch.tensor([1, 4], dtype=torch.int32),
        "positions": 15,
        "dtype": torch.float32,
    }
    op.unpack(**args)
    with pytest.raises(ValueError, match=message):
        op.unpack(**{**args, **change})
