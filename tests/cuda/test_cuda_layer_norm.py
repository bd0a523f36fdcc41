import pytest
import torch
from helpers import SENTINEL, assert_within_budget, offset_view
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_layer_norm import case, stock_and_exact

from clinfast.backends.cuda import native
from clinfast.backends.cuda.layer_norm import layer_norm

DTYPES = list(native.DTYPES)
# Around every choice of kernel: odd, a warp's widest, the first of a block, its widest.
SHAPES = [
    (1, 1), (2, 7), (5, 33), (3, 384), (4, 512), (5, 768), (6, 1016), (3, 1023), (2, 1024), (2, 1025), (2, 1032),
    (1, 4096), (2, 4104), (1, 16384),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
def test_matches_reference(machine, rows, hidden, residual, dtype):
    args = case(rows, hidden, dtype, residual)
    assert_within_budget(machine(layer_norm, *args, 1e-12), *stock_and_exact(*args, 1e-12))


@pytest.mark.parametrize("hidden", [768, 2048])
def test_large_mean_does_not_cancel(machine, hidden):
    args = case(4, hidden, torch.float32, False, scale=1e-2, shift=1e3)
    assert_within_budget(machine(layer_norm, *args, 1e-12), *stock_and_exact(*args, 1e-12))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 9), hidden=st.integers(1, 1100), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_any_shape_from_offset_views(machine, rows, hidden, dtype, seed):
    x, r, weight, bias = case(rows, hidden, dtype, True, seed=seed)
    ours = machine(layer_norm, offset_view(x), offset_view(r), weight, bias, 1e-5)
    assert torch.equal(ours, machine(layer_norm, x, r, weight, bias, 1e-5))
    assert_within_budget(ours, *stock_and_exact(x, r, weight, bias, 1e-5))


def test_a_view_has_the_bits_of_its_copy(machine):
    for hidden in (768, 1024, 2048):
        for dtype in DTYPES:
            x, r, weight, bias = case(3, hidden, dtype, True)
            ours = machine(layer_norm, offset_view(x), offset_view(r), weight, bias, 1e-5)
            assert torch.equal(ours, machine(layer_norm, x, r, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [33, 768, 1100])
def test_bias_is_added_before_the_statistics_and_nothing_outside_is_written(machine, hidden, dtype):
    x, r, weight, shift = (None if t is None else machine.there(t) for t in case(5, hidden, dtype, True))
    bias = machine.there(torch.linspace(-2, 2, hidden))
    big = machine.there(torch.full((7, hidden + 6), SENTINEL, dtype=dtype))
    out = big[1:-1, 3:-3]
    machine.kernels.layer_norm(
        x.data_ptr(), r.data_ptr(), bias.data_ptr(), weight.data_ptr(), shift.data_ptr(), out.data_ptr(), hidden,
        hidden, hidden + 6, 5, hidden, 1e-5, native.DTYPES[dtype], *machine.device_and_stream(),
    )  # fmt: skip
    total = [t.double().cpu() for t in (x, r, bias, weight, shift)]
    exact = torch.nn.functional.layer_norm(total[0] + total[2] + total[1], (hidden,), total[3], total[4], 1e-5)
    stock = torch.nn.functional.layer_norm(
        x.cpu().float() + bias.cpu() + r.cpu().float(), (hidden,), weight.cpu(), shift.cpu(), 1e-5
    ).to(dtype)
    assert_within_budget(out.cpu(), stock, exact)
    out.fill_(SENTINEL)
    assert (big == torch.tensor(SENTINEL, dtype=dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(machine, dtype):
    x, r, weight, bias = case(11, 768, dtype, True)
    whole = machine(layer_norm, x, r, weight, bias, 1e-12)
    for i in (0, 5, 10):
        assert torch.equal(whole[i : i + 1], machine(layer_norm, x[i : i + 1], r[i : i + 1], weight, bias, 1e-12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 20, dtype=torch.float64)}, "x has dtype torch.float64; it must be float32, bfloat16 or"),
        ({"x": torch.zeros(20)}, "2 dimensions"),
        ({"x": torch.zeros(20, 3).t()}, "contiguous"),
        ({"x": torch.zeros(3, 16385)}, "hidden is 16385"),
        ({"residual": torch.zeros(4, 20)}, "residual has shape"),
        ({"residual": torch.zeros(3, 20, dtype=torch.float16)}, "residual has dtype"),
        ({"weight": torch.zeros(19)}, "weight is"),
        ({"shift": torch.zeros(20, dtype=torch.bfloat16)}, "shift is"),
    ],
)
def test_bad_arguments_are_named(machine, change, message):
    x, r, weight, bias = case(3, 20, torch.float32, True)
    args = {"x": x, "residual": r, "weight": weight, "shift": bias, "eps": 1e-5}
    machine(layer_norm, **args)
    with pytest.raises(ValueError, match=message):
        machine(layer_norm, **{**args, **change})


def test_cpu_memory_is_refused_by_name(monkeypatch):
    x, r, weight, bias = case(3, 20, torch.float32, True)
    with pytest.raises(ValueError, match="x is on cpu; the compiled CUDA kernels need it on an NVIDIA GPU"):
        layer_norm(x, r, weight, bias, 1e-5)
