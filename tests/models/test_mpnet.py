"""What MPNet alone has: biases by relative distance, which stock counts in columns."""

import pytest
import torch
from bert_models import Subject, ids, right_padded
from relatives import make
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from clinfast import models
from clinfast.engine.spec import Unsupported

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning")]

# Notes beyond the distance that has a bucket of its own, and more keys than a block of any kernel.
LONG = {"max_position_embeddings": 720, "hidden_size": 128}
LENGTHS = [700, 3, 150, 290]
SCATTERED = torch.rand(4, 700, generator=torch.Generator().manual_seed(0)) < 0.6
SCATTERED[:, 0] = True
MASKS = {
    "right": right_padded(LENGTHS),
    "left": right_padded(LENGTHS).flip(1),
    "holes": SCATTERED.long(),
    "a-gap": right_padded(LENGTHS) - torch.nn.functional.pad(right_padded([60, 0, 60, 60]), (40, 600)),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"padding": "keep"}, {"backend": "torch"}], ids=str)
def test_long_notes(mask, options):
    dtype = options.get("dtype", torch.float32)
    rest = {name: value for name, value in options.items() if name != "dtype"}
    subject = Subject(make("mpnet", "token", dtype=dtype, **LONG), **rest)
    subject.check(all_positions="padding" in rest, input_ids=ids(4, 700), attention_mask=MASKS[mask])


@pytest.mark.parametrize("mask", ["right", "holes", "a-gap"])
def test_the_last_layer_on_first_tokens_alone(mask):
    subject = Subject(make("mpnet", "sequence", **LONG))
    subject.check(input_ids=ids(4, 700), attention_mask=MASKS[mask])


def test_too_few_buckets_are_refused():
    """Stock fails at a distance whose bucket has no row."""
    model = make("mpnet", "token", relative_attention_num_buckets=20)
    with pytest.raises(Unsupported, match=r"mpnet.encoder.relative_attention_bias has 20 rows; 32 are needed"):
        models.match(model)


def test_other_buckets_are_refused(monkeypatch):
    other = staticmethod(lambda distances, num_buckets=32: distances.clamp(0, 31))
    monkeypatch.setattr(MPNetEncoder, "relative_position_bucket", other)
    with pytest.raises(Unsupported, match="relative_position_bucket gives other buckets"):
        models.match(make("mpnet"))
