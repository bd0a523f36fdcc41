"""Whole small models through `optimize` with the interpreted kernels, against stock in float64."""

import pytest
import torch
from bert_models import Subject, ids, make, right_padded
from engine_fakes import with_graphs
from relatives import make as relative
from transformers import RobertaConfig, RobertaForTokenClassification, XLMRobertaXLConfig, XLMRobertaXLModel

import clinfast
from clinfast.backends.triton import launch
from clinfast.engine import precision
from clinfast.engine.executors.eager import EagerExecutor
from clinfast.ops import registry


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The engine's ways that depend on the type of device, which here reads cpu."""
    before = EagerExecutor.__init__

    def init(self, *args):
        before(self, *args)
        self.adds_in_norm = self.whole_ffn = True

    monkeypatch.setattr(EagerExecutor, "__init__", init)
    registry.calls.clear()


def ran():
    return {label for label, count in registry.calls.items() if count}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["base", "sequence", "token"])
def test_bert(head, dtype):
    subject = Subject(make(head, dtype=dtype))
    batch = ids(4, 20)
    mask = right_padded([20, 1, 13, 7])
    subject.check(input_ids=batch, attention_mask=mask, token_type_ids=batch % 2)
    assert ran() >= {f"{op}[triton]" for op in ("pack", "embedding", "attention", "layer_norm", "linear.prepack")}
    assert not {label for label in ran() if label.endswith("[torch]")}
    linear = clinfast.report(subject.model).units[0].facts["linear"]
    assert linear == ("cuBLAS" if dtype is torch.float32 else "Triton, cuBLAS")


def test_bert_in_fp16():
    subject = Subject(make("token", dtype=torch.float16))
    subject.check(input_ids=ids(3, 16), attention_mask=right_padded([16, 9, 2]))


def test_padding_kept():
    subject = Subject(make("base"), padding="keep")
    subject.check(input_ids=ids(3, 16), attention_mask=right_padded([16, 9, 2]))
    assert registry.calls["unpack[triton]"]


def test_roberta_counts_positions():
    torch.manual_seed(0)
    model = RobertaForTokenClassification(
        RobertaConfig(
            vocab_size=97, hidden_size=64, num_attention_heads=2, num_hidden_layers=2, intermediate_size=96,
            max_position_embeddings=64, pad_token_id=1,
        )
    ).eval()  # fmt: skip
    subject = Subject(model)
    mask = right_padded([18, 5])
    subject.check(input_ids=torch.where(mask.bool(), ids(2, 18) % 90 + 3, 1), attention_mask=mask)
    assert registry.calls["position_ids[triton]"]


def test_modernbert():
    """Op by op and in a graph, which knows ranks only: a mask with holes runs op by op, its windows in PyTorch."""
    subject = Subject(relative("modernbert", "sequence", num_hidden_layers=3))
    batch, mask = ids(3, 18), right_padded([18, 5, 11])
    expected = subject.check(input_ids=batch, attention_mask=mask)
    assert ran() >= {f"{op}[triton]" for op in ("attention_windowed", "rotate", "gate", "attention")}
    assert not {label for label in ran() if label.endswith("[torch]")}
    driver, graphs = with_graphs(subject.model)
    again = subject.check(input_ids=batch, attention_mask=mask)
    assert driver.replays == 1 and not graphs.op_by_op
    assert not {label for label in ran() if label.endswith("[torch]")}
    torch.testing.assert_close(again["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    holes = torch.tensor([[1] * 18, [1, 0] * 9, [1] * 4 + [0] * 14])
    subject.check(input_ids=batch, attention_mask=holes)
    assert any("holes" in reason for reason in graphs.op_by_op)
    assert registry.calls["attention_windowed[torch]"]


def test_nomic_bert():
    subject = Subject(relative("nomic-bert", "token"))
    subject.check(input_ids=ids(3, 18), attention_mask=right_padded([18, 5, 11]))
    assert ran() >= {"rotate[triton]", "gate[triton]"}
    assert not {label for label in ran() if label.endswith("[torch]")}


@pytest.mark.parametrize(
    ("family", "op"), [("mpnet", "attention_biased"), ("deberta-v2", "attention_disentangled")]
)
@pytest.mark.parametrize("head", ["token", "sequence"])
def test_distances_are_counted_in_columns(head, family, op):
    """Op by op and in a graph, whose buffers hold more notes and rows than were asked for."""
    mask = torch.tensor([[1] * 18, [1, 0] * 9, [1] * 4 + [0] * 14])
    inputs = {"input_ids": ids(3, 18), "attention_mask": mask}
    subject = Subject(relative(family, head))
    registry.calls.clear()
    subject.check(**inputs)
    assert registry.calls[f"{op}[triton]"] == 2 and not registry.calls["attention[triton]"]
    driver, graphs = with_graphs(subject.model)
    subject.check(**inputs)
    assert driver.replays == 1 and not graphs.op_by_op


def test_norm_before_its_layer_and_an_embedding_without_one():
    torch.manual_seed(0)
    model = XLMRobertaXLModel(
        XLMRobertaXLConfig(
            vocab_size=97, hidden_size=64, num_attention_heads=2, num_hidden_layers=2, intermediate_size=96,
            max_position_embeddings=64, pad_token_id=1,
        )
    ).eval()  # fmt: skip
    subject = Subject(model)
    mask = right_padded([18, 5])
    subject.check(input_ids=torch.where(mask.bool(), ids(2, 18) % 90 + 3, 1), attention_mask=mask)
    assert registry.calls["embedding[triton]"]
    assert not {label for label in ran() if label.endswith("[torch]")}


def test_an_id_out_of_range_raises_before_the_gather():
    subject = Subject(make("token"))
    batch = ids(2, 8)
    batch[1, 3] = 97
    before = registry.calls["embedding[triton]"]
    with torch.no_grad(), pytest.raises(IndexError, match=r"input_ids\[1, 3\] is 97"):
        subject.model(input_ids=batch)
    assert registry.calls["embedding[triton]"] == before


def test_reproducible_is_proved_or_refused():
    try:
        model = clinfast.optimize(make("base"), reproducible=True)
    except clinfast.Unsupported as refusal:
        assert "reproducible" in str(refusal)
    else:
        assert clinfast.report(model).units[0].facts["reproducible"]


@pytest.mark.parametrize(("head", "padding"), [("sequence", "remove"), ("qa", "keep")])
def test_graphs_on_these_kernels(head, padding):
    """Buckets with rows and notes that nobody asked for, twice: their rows hold what an earlier batch left."""
    subject = Subject(make(head), padding=padding)
    driver, graphs = with_graphs(subject.model)
    for lengths in ([13, 1, 7], [3]):
        subject.check(input_ids=ids(len(lengths), max(lengths)), attention_mask=right_padded(lengths))
    assert driver.replays == 2 and not graphs.op_by_op
    assert "pack_into_kernel" in {key[0] for key in launch._runners}


def test_fp8_with_fused_quantisation(monkeypatch):
    monkeypatch.setattr(precision, "fp8_refusal", lambda device: None)

    def product(a, b, *, scale_a, scale_b, bias, out_dtype):  # which older releases of torch lack on the CPU
        return ((a.float() @ b.float()) * scale_a * scale_b + bias.float()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    batch = {"input_ids": ids(3, 20), "attention_mask": right_padded([20, 7, 13])}
    model = clinfast.optimize(make("token"), precision="fp8", strict=True)
    driver, _ = with_graphs(model)
    plain = clinfast.optimize(make("token"), precision="fp8", backend="torch", strict=True)
    ours, expected = clinfast.verify(model, batch), clinfast.verify(plain, batch)
    assert driver.replays == 1 and ours.passed and ours.ours_error > ours.stock_error / 2
    assert ours.ours_error <= 1.5 * expected.ours_error and ours.cosine > 0.95
