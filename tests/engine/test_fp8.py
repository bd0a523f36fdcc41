"""fp8 rows and products in torch's own e4m3 on the CPU, against fp32; who is refused, and with which words."""

import pytest
import torch
from bert_models import ids, make, right_padded, run
from engine_fakes import encoder_of, with_graphs

import clinfast
from clinfast import rounded
from clinfast.backends import fp8
from clinfast.engine import precision

pytestmark = pytest.mark.usefixtures("one_thread")


def _multiplies_here() -> bool:
    values, scale = fp8.quantise_rows(torch.ones(16, 16))
    try:
        torch._scaled_mm(values, values.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except (NotImplementedError, RuntimeError):
        return False
    return True


multiplies = pytest.mark.skipif(not _multiplies_here(), reason="this torch has no _scaled_mm of scaled rows on the CPU")
STEP = 2.0**-4  # half of e4m3's relative step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1e-20, 1e-3, 1.0, 1e4])
def test_rows_are_within_half_a_step_of_their_largest_value(dtype, spread):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(40, 768, generator=g) * spread * torch.logspace(-3, 3, 40)[:, None]).to(dtype)
    values, scale = fp8.quantise_rows(x)
    assert values.dtype is torch.float8_e4m3fn and scale.shape == (40, 1) and scale.dtype is torch.float32
    back, exact = values.float() * scale, x.float()
    largest = exact.abs().amax(1, keepdim=True)
    # Normal numbers by half a step of themselves; below 2^-6 of the range's 448, by half a step of subnormals.
    assert ((back - exact).abs() <= exact.abs() * STEP * 1.001 + largest * 2.0**-10 / 448 * 1.001).all()
    assert torch.equal(values.float().abs().amax(1), torch.full((40,), 448.0))


def test_zeros_and_single_large_values():
    x = torch.zeros(2, 32)
    x[1, 3] = -3e38
    values, scale = fp8.quantise_rows(x)
    assert torch.equal(values.float()[0], torch.zeros(32)) and scale.isfinite().all()
    torch.testing.assert_close(values.float() * scale, x)


@multiplies
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "relu"])
def test_product_against_fp32(activation):
    g = torch.Generator().manual_seed(1)
    x, weight, bias = torch.randn(33, 128, generator=g), torch.randn(96, 128, generator=g), torch.randn(96, generator=g)
    x *= torch.logspace(-2, 2, 33)[:, None]
    linear = fp8.Fp8Linear(weight, bias, torch.bfloat16)
    y = linear(x.bfloat16(), activation)
    if activation == "none":
        ours = y.float()
    else:  # comes out quantised, for the next
        values, scale = fp8.attached(y)
        assert values is y and y.dtype is torch.float8_e4m3fn
        ours = values.float() * scale
    exact = fp8.activate(x @ weight.T + bias, activation)
    # Independent roundings of two factors, each uniform within half a step: a root mean square of STEP / sqrt(3) each.
    size = (x.square() @ weight.square().T + exact.square()).sqrt()
    error = (ours - exact).square().mean(1).sqrt() / size.square().mean(1).sqrt()
    # What comes out quantised has one more, and GELU's slope reaches 1.13.
    roundings = 2 if activation == "none" else 4
    assert (error < roundings * STEP / 3**0.5).all() and error.mean() > 1e-3


def test_norm_hands_its_quantised_rows_on():
    g = torch.Generator().manual_seed(2)
    x, residual = (torch.randn(9, 64, generator=g).bfloat16() for _ in "ab")
    y = fp8.layer_norm(x, residual, torch.ones(64), torch.zeros(64), 1e-12)
    values, scale = fp8.attached(y)
    expected = fp8.quantise_rows(y)
    assert torch.equal(values.view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(scale, expected[1])


@multiplies
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("head", ["base", "sequence", "token"])
def test_whole_models(head, graphs, monkeypatch):
    """On the CPU, which is let through for once; the error is measured, and stands in the report."""
    monkeypatch.setattr(precision, "fp8_refusal", lambda device: None)
    asked = []
    rows = fp8.quantise_rows
    monkeypatch.setattr(fp8.Fp8Linear.__init__, "__defaults__", (lambda *a: asked.append(a) or rows(*a),))
    model = clinfast.optimize(make(head), precision="fp8", backend="torch", strict=True)
    if graphs:
        driver, _ = with_graphs(model)
    batch = {"input_ids": ids(3, 20), "attention_mask": right_padded([20, 7, 13])}
    asked.clear()
    run(model, **batch)
    # Per layer: the context of attention, and GELU; the norms' rows come with them. Once more, the embedding's, and the
    # rows of first tokens. A capture runs it once more.
    once = 2 * 2 + 1 + (head == "sequence")
    assert len(asked) == (2 * once if graphs else once)
    found = clinfast.verify(model, batch)
    # These weights are random, hence without the redundancy that quantisation lives on: stock in fp8 errs as much.
    assert found.passed and found.stock_error / 2 < found.ours_error < 2 * found.stock_error and found.cosine > 0.95
    assert clinfast.verify(model, batch, tolerance=1.01 * found.max_difference)
    text = str(clinfast.report(model))
    assert "computed in fp8, the rest in bfloat16" in text and f"ours {found.ours_error:.1e}" in text
    assert encoder_of(model).weights().branches[0:1] or head == "base"
    assert not graphs or driver.replays


@multiplies
@pytest.mark.parametrize("damage", ["scale", "weight", "nothing"])
def test_verify_holds_fp8_to_stock_in_fp8(damage, monkeypatch):
    """What is wrong in one product of one layer shows beside the rounding of all of them."""
    monkeypatch.setattr(precision, "fp8_refusal", lambda device: None)
    model = clinfast.optimize(make("token"), precision="fp8", backend="torch", strict=True)
    batch = {"input_ids": ids(3, 20), "attention_mask": right_padded([20, 7, 13])}
    linear = encoder_of(model).weights().layers[0].ffn_out
    if damage == "scale":
        linear.scale *= 4
    if damage == "weight":
        linear.weight = linear.weight.roll(1, 0)
    found = clinfast.verify(model, batch)
    assert found.passed is (damage == "nothing"), found


@multiplies
def test_stock_in_fp8_is_stock_but_for_its_products(monkeypatch):
    monkeypatch.setattr(precision, "fp8_refusal", lambda device: None)
    model = clinfast.optimize(make("token"), precision="fp8", backend="torch", strict=True)
    stock = rounded.rounded_stock(model, encoder_of(model))
    kinds = [type(m) for m in stock.modules() if isinstance(m, torch.nn.Linear)]
    layers = model.config.num_hidden_layers
    assert kinds.count(rounded.Fp8Linear) == 6 * layers and kinds.count(torch.nn.Linear) == 1  # the classifier
    assert not any(isinstance(m, rounded.Fp8Linear) for m in model.modules())
    assert next(stock.parameters()).dtype is torch.bfloat16


def test_who_is_refused_and_what_serves():
    with pytest.raises(clinfast.Unsupported) as refusal:
        clinfast.optimize(make("base"), precision="fp8", strict=True)
    assert "the model is on the cpu" in str(refusal.value) and "precision='bf16'" in str(refusal.value)


def test_an_older_card_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(precision.Unsupported, match=r"9\.0, and NVIDIA A100 has 8\.0; pass precision='fp32' or .*bf16"):
        precision.resolve("fp8", torch.float32, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert precision.resolve("fp8", torch.float32, "cuda") is torch.bfloat16


def test_sizes_that_sixteen_does_not_divide(monkeypatch):
    monkeypatch.setattr(precision, "fp8_refusal", lambda device: None)
    model = make("base", hidden_size=60, num_attention_heads=3)
    with pytest.raises(clinfast.Unsupported, match="multiples of 16"):
        clinfast.optimize(model, precision="fp8", backend="torch", strict=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"precision": "fp8"}, "precision='fp8' is not served by backend='cuda'"),
     ({"reproducible": True}, "reproducible=True is not served by backend='cuda'")],
)  # fmt: skip
def test_a_backend_without_it_is_named(options, words, monkeypatch):
    """Asked of a CPU model's encoder for a GPU: what a machine with the CUDA kernels alone would say."""
    encoder = encoder_of(clinfast.optimize(make("base")))
    encoder.backend, encoder.precision = "cuda", options.get("precision", "auto")
    encoder.wants_same_bits = options.get("reproducible", False)

    def implementation(name, backend, device="cpu", *, prechecked=False):
        if name in ("layer_norm.fp8", "attention.fixed"):
            raise RuntimeError(f"no backend of {backend} serves the op {name!r}")

    monkeypatch.setattr("clinfast.ops.registry.implementation", implementation)
    monkeypatch.setattr("clinfast.ops.registry.optional", lambda *args: None)
    with pytest.raises(clinfast.Unsupported, match=words):
        encoder._make_executor("cuda")
