import os

import pytest
import torch
from helpers import offset_view
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import LAYOUTS, MASK_DTYPES, TYPES, VOCAB, assert_packs_alike, laid_out, unpack_case

from clinfast.backends import torch as stock
from clinfast.backends.triton import launch
from clinfast.backends.triton import packing as backend
from clinfast.backends.triton import packing_buffers as into
from clinfast.ops import packing as op
from clinfast.ops.packing import PackedBuffers
from clinfast.triton_kernels.variants import SCAN_HEAD

some = settings(max_examples=25, deadline=None)


def assert_packs(*args):
    assert_packs_alike(op.pack(*args), op.pack_reference(*args))


@some
@given(data=st.data())
def test_pack_any_batch(data):
    batch, seqlen = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 140))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    layout = data.draw(st.sampled_from(LAYOUTS))
    wide = data.draw(st.sampled_from([torch.int32, torch.int64]))
    ids = torch.randint(0, VOCAB, (batch, seqlen), generator=g, dtype=wide)
    types = torch.randint(0, TYPES, (batch, seqlen), generator=g) if data.draw(st.booleans()) else None
    mask = None
    if data.draw(st.booleans()):
        dtype = data.draw(st.sampled_from(MASK_DTYPES))
        value = data.draw(st.sampled_from([1, 2, -1, 256])) if dtype in (torch.int32, torch.int64) else 1
        mask = laid_out(((torch.rand(batch, seqlen, generator=g) < 0.6) * value).to(dtype), layout, 1)
    args = (laid_out(ids, layout, VOCAB), mask, None if types is None else laid_out(types, layout, -1))
    assert_packs(*args, VOCAB, TYPES, data.draw(st.booleans()))


@pytest.mark.parametrize("keep_padding", [False, True])
@pytest.mark.parametrize(
    ("batch", "seqlen"),
    [(1, 1), (1, 512), (8, 100), (33, 40), (2, 1200), (32, 512), (1, 3000), (700, 3), (0, 600), (40, 0)],
)
def test_pack_is_one_launch(batch, seqlen, keep_padding):
    g = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, VOCAB, (batch, seqlen), generator=g)
    lengths = torch.randint(0, seqlen + 1, (batch, 1), generator=g)
    before = launch.launches["jit"]
    for mask in (torch.arange(seqlen) < lengths, (torch.arange(seqlen) >= lengths).long(), None):
        assert_packs(ids, mask, None, VOCAB, TYPES, keep_padding)
    assert launch.launches["jit"] == before + 3
    assert not any(state.any() for state in backend._states.__dict__.values())


def beside_each_other(shares, tensors, numbers, tile):
    """One launch whose programs run in processes of their own, as many in each as `shares` says, at the same time."""
    from triton.runtime.interpreter import interpreter_builder as builder

    workers = []
    for share in shares:
        worker = os.fork()
        if not worker:
            code = 1
            try:
                builder.set_grid_dim = lambda *_: type(builder).set_grid_dim(builder, sum(shares), 1, 1)
                launch.launch("pack_scan_kernel", (share, 1, 1), (*tensors, *numbers), tile)
                code = 0
            finally:
                os._exit(code)
        workers.append(worker)
    assert not any(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers)


@pytest.mark.parametrize(
    ("batch", "seqlen", "tile", "shares", "keep_padding"),
    [(61, 40, (8, 128), [3, 1, 4], 0), (61, 40, (8, 128), [4, 4], 1), (150, 12, (1, 32), [50, 20, 80], 0)],
)
def test_programs_at_the_same_time(batch, seqlen, tile, shares, keep_padding):
    """They wait for one another in whatever order they come; the last batch reaches back beyond one window."""
    g = torch.Generator().manual_seed(batch)
    ids = torch.randint(-1, VOCAB, (batch, seqlen), generator=g)
    mask = torch.rand(batch, seqlen, generator=g) < 0.5
    expected = op.pack_reference(ids, mask, None, VOCAB, 0, bool(keep_padding))
    ours = [torch.full_like(x, -7).share_memory_() for x in (expected[1], expected[0], expected[2], expected[3])]
    state = torch.zeros(SCAN_HEAD + sum(shares), dtype=torch.int64).share_memory_()
    numbers = (batch, seqlen, 0, 0, VOCAB, 0, 0, 0, 1, 0, keep_padding, 0, *ids.stride(), *mask.stride(), *ids.stride())
    for _ in range(2):
        beside_each_other(shares, (ids, mask, ids, None, None, None, *ours, state), numbers, tile)
        assert_packs_alike((ours[1], ours[0], ours[2], ours[3]), expected)
        assert not state.any()


@pytest.mark.parametrize("shape", [(3, 40), (2, 700)])
@pytest.mark.parametrize("bad", [-1, VOCAB, 2**40, -(2**63)])
def test_pack_finds_the_first_value_out_of_range(shape, bad):
    for where in (0, 57, shape[0] * shape[1] - 1):
        ids = torch.zeros(shape, dtype=torch.int64)
        ids.view(-1)[where:] = bad
        assert_packs(ids, torch.zeros(shape, dtype=torch.bool), None, VOCAB, TYPES)
        assert_packs(torch.zeros_like(ids), None, ids, VOCAB, TYPES)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16,) * 2])
def test_unpack(dtypes):
    for batch, seqlen, hidden, keep in ((3, 17, 90, False), (1, 1, 1, True), (2, 9, 300, True), (4, 30, 5, False)):
        packed, indices = unpack_case(batch, seqlen, hidden, dtypes[0], keep)
        expected = op.unpack_reference(packed, indices, batch * seqlen, dtypes[1])
        for unpack in (op.unpack, backend.prechecked):
            assert torch.equal(unpack(offset_view(packed), indices, batch * seqlen, dtypes[1]), expected)


def test_unpack_of_nothing_is_zeros():
    out = backend.prechecked(torch.empty(0, 8), torch.empty(0, dtype=torch.int32), 5, torch.float32)
    assert out.shape == (5, 8) and (out == 0).all()


@pytest.mark.parametrize("bad", [-1, 12, 2**31 - 1])
def test_unpack_refuses_an_index_outside_and_writes_nothing_there(bad):
    packed, indices = torch.ones(3, 4), torch.tensor([1, bad, 2], dtype=torch.int32)
    with pytest.raises(IndexError, match=rf"indices\[1\] is {bad}"):
        op.unpack(packed, indices, 12, torch.float32)
    backend.prechecked(packed, indices, 12, torch.float32)


@some
@given(
    batch=st.integers(0, 5),
    seqlen=st.integers(0, 600),
    padding_idx=st.integers(0, 3),
    wide=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def test_position_ids(batch, seqlen, padding_idx, wide, layout):
    ids = torch.randint(0, 4, (batch, seqlen), generator=torch.Generator().manual_seed(seqlen))
    ids = laid_out(ids if wide else ids.int(), layout, 1)
    assert torch.equal(op.position_ids(ids, padding_idx), op.position_ids_reference(ids, padding_idx))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: op.pack(i.float(), None, None, 5, 2), "input_ids has dtype torch.float32"),
        (lambda i: op.pack(i, i[:, :2], None, 5, 2), "attention_mask has shape"),
        (lambda i: op.pack(i, i.float(), None, 5, 2), "attention_mask has dtype"),
        (lambda i: op.pack(i, None, i.bool(), 5, 2), "token_type_ids has dtype"),
        (lambda i: op.pack(i, None, None, -1, 2), "vocab_size is -1"),
        (lambda i: op.position_ids(i, -1), "padding_idx is -1"),
        (lambda i: op.unpack(torch.ones(2, 6).t(), i.view(-1).int(), 9, torch.float32), "packed has strides"),
        (lambda i: op.unpack(torch.ones(20, 6), i.view(-1).int(), 9, torch.float32), "at least 20 entries"),
        (lambda i: op.unpack(torch.ones(2, 6), i.view(-1).int(), -1, torch.float32), "positions is -1"),
        (lambda i: op.unpack(torch.ones(2, 6), i.view(-1).int(), 9, torch.int32), "dtype is torch.int32"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 5, dtype=torch.int64))


@some
@given(data=st.data())
def test_pack_into(data):
    """As PyTorch does it, on buffers with rows of an earlier batch; rows past the tokens may hold anything in range."""
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    buffers = [PackedBuffers.of(1200, 32, torch.device("cpu")) for _ in range(2)]
    for _ in range(2):
        shapes = [(1, 1), (1, 300), (5, 17), (8, 60), (20, 21), (33, 11), (9, 64), (2, 590)]
        batch, seqlen = data.draw(st.sampled_from(shapes))
        wide = data.draw(st.sampled_from([torch.int32, torch.int64]))
        layout = data.draw(st.sampled_from(LAYOUTS))
        ids = torch.randint(-1 if data.draw(st.booleans()) else 0, VOCAB, (batch, seqlen), generator=g, dtype=wide)
        types = torch.randint(0, TYPES + 1, (batch, seqlen), generator=g) if data.draw(st.booleans()) else None
        mask = None
        if data.draw(st.booleans()):
            mask = laid_out((torch.rand(batch, seqlen, generator=g) < 0.6).to(torch.int64), layout, 1)
        padding_idx = data.draw(st.sampled_from([None, 1]))
        constants = op.PackInto(VOCAB, TYPES, 2, padding_idx, data.draw(st.booleans()))
        notes = data.draw(st.sampled_from([64, 170])) if batch > 32 else data.draw(st.sampled_from([32, batch]))
        if notes > 32:
            buffers = [PackedBuffers.of(1200, 200, torch.device("cpu")) for _ in range(2)]
        args = (laid_out(ids, layout, VOCAB), mask, types, constants, 1190, notes)
        before = launch.launches["jit"]
        into.pack_into(*args, buffers[0])
        assert launch.launches["jit"] <= before + 1
        stock.pack_into(*args, buffers[1])
        tokens = int(buffers[1].facts[0])
        for name in ("cu_seqlens", "seqused_k", "facts"):
            assert torch.equal(getattr(buffers[0], name), getattr(buffers[1], name)), name
        for name in ("input_ids", "token_type_ids", "position_ids", "indices"):
            assert torch.equal(getattr(buffers[0], name)[:tokens], getattr(buffers[1], name)[:tokens]), name
            assert (getattr(buffers[0], name) >= 0).all()
