"""Memory stays bounded: over many shapes, over optimize and restore, over freed models."""

import gc
import weakref

import pytest
import torch
from bert_models import make, run

import clinfast

pytestmark = pytest.mark.usefixtures("one_thread")


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


TINY = {"hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 16, "num_hidden_layers": 1}


@pytest.mark.parametrize("head", ["no-pooler", "sequence"])
def test_ten_thousand_shapes(head):
    model = clinfast.optimize(make(head, max_position_embeddings=512, **TINY))
    generator = torch.Generator().manual_seed(0)
    calls = 10_000

    def call():
        batch, seqlen = torch.randint(1, 9, (), generator=generator), torch.randint(1, 129, (), generator=generator)
        lengths = torch.randint(1, int(seqlen) + 1, (int(batch), 1), generator=generator)
        mask = (torch.arange(int(seqlen)) < lengths).long()
        model(input_ids=torch.randint(0, 97, mask.shape, generator=generator), attention_mask=mask)

    with torch.inference_mode():
        for _ in range(1000):
            call()
        gc.collect()
        before = resident_bytes()
        for _ in range(calls - 1000):
            call()
    assert clinfast.report(model).calls_fast == calls
    gc.collect()
    assert resident_bytes() - before < 8 << 20


def test_optimize_and_restore_leave_nothing():
    model = make(hidden_size=256, num_attention_heads=4, intermediate_size=1024, num_hidden_layers=2)
    inputs = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}

    def cycle():
        clinfast.optimize(model)
        run(model, **inputs)
        clinfast.restore(model)

    for _ in range(5):
        cycle()
    gc.collect()
    before = resident_bytes()
    for _ in range(30):
        cycle()
    gc.collect()
    packed = 6 << 20
    assert resident_bytes() - before < 4 * packed


def test_an_optimized_model_is_freed_as_a_stock_one_is():
    model = clinfast.optimize(make())
    run(model, input_ids=torch.zeros(2, 8, dtype=torch.long))
    reference = weakref.ref(model)
    weights = weakref.ref(model.embeddings.word_embeddings.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert reference() is None and weights() is None
    finally:
        gc.enable()


def test_repacking_lets_go_of_the_old_pack():
    model = clinfast.optimize(
        make(vocab_size=100, hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_hidden_layers=2)
    )
    inputs = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    run(model, **inputs)
    gc.collect()
    before = resident_bytes()
    for _ in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        run(model, **inputs)
    gc.collect()
    packed = clinfast.report(model).units[0].facts["packed_bytes"]
    assert packed > 50 << 20
    assert resident_bytes() - before < packed


def test_what_optimize_adds_is_one_copy_of_the_weights():
    model = make(vocab_size=100, hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_hidden_layers=4)
    weights = sum(p.nbytes for p in model.parameters())
    gc.collect()
    before = resident_bytes()
    clinfast.optimize(model)
    gc.collect()
    assert resident_bytes() - before < 1.15 * weights
