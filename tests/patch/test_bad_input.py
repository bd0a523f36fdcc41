"""Bad input: the error class that stock raises, a sentence with the offending value, and no harm to later calls."""

import pytest
import torch
from bert_models import VOCAB, assert_equal, ids, right_padded, run
from patched_models import Pair
from transformers_version import FOUR

IDS = ids(3, 9)
LONG = torch.int64

# inputs, and what the message has to hold; the class is asked of stock.
CASES = {
    "too long": ({"input_ids": ids(2, 65)}, r"65 columns.*64 positions"),
    "too long, with a mask": (
        {"input_ids": ids(2, 65), "attention_mask": right_padded([65, 3])},
        r"65 columns.*64 positions",
    ),
    "too long, with types": (
        {"input_ids": ids(2, 65), "token_type_ids": torch.zeros(2, 65, dtype=LONG)},
        r"65 columns.*64 positions",
    ),
    "1-D ids": ({"input_ids": IDS[0]}, r"shape \[9\]; \[batch, tokens\]"),
    "3-D ids": ({"input_ids": IDS[None]}, r"shape \[1, 3, 9\]"),
    "0-D ids": ({"input_ids": torch.tensor(3)}, r"shape \[\]"),
    "float ids": ({"input_ids": IDS.float()}, r"input_ids is torch.float32"),
    "int16 ids": ({"input_ids": IDS.to(torch.int16)}, r"input_ids is torch.int16"),
    "bool ids": ({"input_ids": IDS.bool()}, r"input_ids is torch.bool"),
    "list ids": ({"input_ids": [[1, 2, 3]]}, r"input_ids is a builtins.list"),
    "no ids": ({}, r"input_ids"),
    "id too large": ({"input_ids": torch.tensor([[1, VOCAB, 2]])}, rf"is {VOCAB}.*{VOCAB} entries"),
    "negative id": ({"input_ids": torch.tensor([[1, -7, 2]])}, r"is -7"),
    "type too large": ({"input_ids": IDS, "token_type_ids": torch.full_like(IDS, 2)}, r"is 2.*2 entries"),
    "negative type": ({"input_ids": IDS, "token_type_ids": torch.full_like(IDS, -1)}, r"is -1"),
    "float types": ({"input_ids": IDS, "token_type_ids": torch.zeros(3, 9)}, r"token_type_ids is torch.float32"),
    "types too wide": (
        {"input_ids": IDS, "token_type_ids": torch.zeros(3, 10, dtype=LONG)},
        r"token_type_ids has shape \[3, 10\].*\[3, 9\]",
    ),
    "types of another batch": (
        {"input_ids": IDS, "token_type_ids": torch.zeros(4, 9, dtype=LONG)},
        r"token_type_ids has shape \[4, 9\]",
    ),
    "mask too wide": (
        {"input_ids": IDS, "attention_mask": right_padded([9, 5, 2], 10)},
        r"attention_mask has shape \[3, 10\].*\[3, 9\]",
    ),
    "mask too narrow": (
        {"input_ids": IDS, "attention_mask": right_padded([8, 5, 2], 8)},
        r"attention_mask has shape \[3, 8\]",
    ),
    "mask of one row": (
        {"input_ids": IDS, "attention_mask": right_padded([5], 9)},
        r"attention_mask has shape \[1, 9\]",
    ),
    "mask as a list": ({"input_ids": IDS, "attention_mask": [[1] * 9] * 3}, r"attention_mask is a builtins.list"),
    "sparse mask": (
        {"input_ids": IDS, "attention_mask": right_padded([9, 5, 2]).to_sparse()},
        r"attention_mask is torch.sparse_coo",
    ),
    "sparse ids": ({"input_ids": IDS.to_sparse()}, r"input_ids is torch.sparse_coo"),
    "nested ids": ({"input_ids": torch.nested.nested_tensor(list(IDS))}, r"input_ids is nested"),
    "no rows": ({"input_ids": ids(0, 9)}, r"shape \[0, 9\]"),
    "no columns": ({"input_ids": ids(2, 0)}, r"shape \[2, 0\]"),
    "no rows, with a mask": ({"input_ids": ids(0, 9), "attention_mask": torch.ones(0, 9)}, r"shape \[0, 9\]"),
}


@pytest.fixture(scope="module", params=["base", "sequence", "token", "qa"])
def pair(request):
    return Pair(request.param)


@pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning")
@pytest.mark.parametrize("case", CASES)
def test_stocks_class_and_the_value(pair, case):
    inputs, text = CASES[case]
    try:
        expected = run(pair.stock, **inputs)
    except Exception as error:
        stock = error
    else:
        assert FOUR, "transformers 5 refuses each of these"
        assert_equal(run(pair.model, **inputs), expected)
        return
    with pytest.raises(Exception, match=text) as ours:
        run(pair.model, **inputs)
    assert type(ours.value) is type(stock)
    pair.check_fast()


@pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning")
def test_stocks_own_words_survive(pair):
    with pytest.raises(Exception) as stock:
        run(pair.stock, input_ids=IDS[0])
    with pytest.raises(type(stock.value)) as ours:
        run(pair.model, input_ids=IDS[0])
    assert str(stock.value) in str(ours.value)


@pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning")
def test_given_twice():
    pair = Pair()
    with torch.no_grad():
        with pytest.raises(TypeError, match="input_ids"):
            pair.model(IDS, input_ids=IDS)
        with pytest.raises(TypeError, match="argument"):
            pair.model(*[IDS] * 30)
    pair.check_fast()


def test_an_all_zero_row_is_finite(pair):
    mask = right_padded([9, 5, 2])
    mask[1] = 0
    out = run(pair.model, input_ids=IDS, attention_mask=mask)
    assert all(value.isfinite().all() for value in out.values())
