"""Whole models with every op on the CUDA kernels; on the CPU under the emulation."""

import pytest
import torch
from engine_fakes import encoder_of, with_graphs
from transformers import BertConfig, BertForTokenClassification, RobertaConfig, RobertaForSequenceClassification

import clinfast
from clinfast.backends import cuda
from clinfast.backends.cuda import native
from clinfast.ops import registry

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 60}
OPS = ("pack", "embedding", "attention", "layer_norm")


@pytest.fixture
def backend_everywhere(machine, monkeypatch):
    """The CUDA backend takes the machine's tensors, CPU memory where it is emulated."""
    caches = (registry.implementation, registry._offer, cuda.implementations, cuda.unavailable)
    both = registry.Backend("clinfast.backends.cuda", ("cpu", "cuda"))
    monkeypatch.setitem(registry.BACKENDS, "cuda", both)
    monkeypatch.setattr(native, "load_error", lambda: None)
    for cache in caches:
        cache.cache_clear()
    yield machine
    for cache in caches:
        cache.cache_clear()


def models(dtype):
    torch.manual_seed(0)
    bert = BertForTokenClassification(BertConfig(**SIZES, num_labels=5))
    roberta = RobertaForSequenceClassification(RobertaConfig(**SIZES, num_labels=3, max_position_embeddings=64))
    return [model.to(dtype).eval() for model in (bert, roberta)]


def test_graphs_on_these_kernels(backend_everywhere):
    """The tail of a bucket is a note without keys; on the CPU with a stand-in for the graph."""
    if backend_everywhere.on_gpu:
        pytest.skip("tests/gpu has graphs on a GPU")
    for model in models(torch.float32):
        clinfast.optimize(model, backend="cuda", strict=True)
        for lengths in ([23, 7, 1, 15], [3]):
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
            ids = torch.randint(3, 60, mask.shape, generator=torch.Generator().manual_seed(1)) * mask + 1 - mask
            with torch.inference_mode():
                encoder_of(model).graphs = None
                expected = model(ids, mask).logits
                driver, _ = with_graphs(model)
                ours = model(ids, mask).logits
            assert driver.replays == 1
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["remove", "keep"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_models_agree_with_stock(backend_everywhere, model_dtype, padding):
    machine = backend_everywhere
    ids = torch.randint(3, 60, (4, 23), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(23) < torch.tensor([23, 7, 1, 15])[:, None]).long()
    ids[mask == 0] = 1
    for model in models(model_dtype):
        with torch.inference_mode():
            exact = model.double()(ids, mask).logits
            stock = model.to(model_dtype)(ids, mask).logits
            model.to(machine.device)
            before = registry.calls.copy()
            clinfast.optimize(model, backend="cuda", padding=padding, strict=True)
            ours = model(ids.to(machine.device), mask.to(machine.device)).logits.cpu()
        for op in OPS:
            assert registry.calls[f"{op}[cuda]"] > before[f"{op}[cuda]"], op
        real = mask.bool() if ours.dim() == 3 else slice(None)
        error, stock_error = ((y.double() - exact)[real].square().mean().sqrt() for y in (ours, stock))
        assert error <= 2 * stock_error + torch.finfo(model_dtype).eps * exact.abs().max() / 4
