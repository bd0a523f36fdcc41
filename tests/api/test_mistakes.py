"""Wrong inputs: the stock error class, the offending value in the text, and the next good call works."""

import copy
import re

import pytest
import torch
from bert_models import VOCAB, assert_equal, ids, make, right_padded, run

import clinfast

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning"),
]

HEADS = ["base", "no-pooler", "sequence", "token", "mlm"]
MASK = right_padded([20, 7, 13])


def good():
    return {"input_ids": ids(3, 20), "attention_mask": MASK.clone(), "token_type_ids": ids(3, 20) % 2}


def with_value(name, row, column, value, dtype=torch.int64):
    inputs = good()
    inputs[name] = inputs[name].to(dtype)
    inputs[name][row, column] = value
    return inputs


def replaced(**changes):
    return {name: value for name, value in {**good(), **changes}.items() if value is not ...}


# What is wrong, and what the text has to name.
BAD = {
    "id-too-large": (with_value("input_ids", 1, 2, VOCAB), [r"input_ids\[1, 2\] is 97", "0 to 96"]),
    "id-negative": (with_value("input_ids", 0, 0, -1), [r"input_ids\[0, 0\] is -1"]),
    "id-huge": (with_value("input_ids", 2, 1, 2**62), [f"{2**62}"]),
    "id-int32": (with_value("input_ids", 2, 1, -(2**31), torch.int32), [f"{-(2**31)}"]),
    "id-in-padding": (with_value("input_ids", 1, 19, 5000), [r"input_ids\[1, 19\] is 5000"]),
    "type-too-large": (with_value("token_type_ids", 1, 3, 2), [r"token_type_ids\[1, 3\] is 2", "0 to 1"]),
    "type-negative": (with_value("token_type_ids", 0, 5, -7), [r"token_type_ids\[0, 5\] is -7"]),
    "too-long": ({"input_ids": ids(2, 65)}, ["65", "64"]),
    "mask-short": (replaced(attention_mask=MASK[:, :19]), [r"attention_mask", r"\[3, 19\]", r"\[3, 20\]"]),
    "mask-rows": (replaced(attention_mask=MASK[:2]), [r"attention_mask", r"\[2, 20\]"]),
    "types-short": (replaced(token_type_ids=good()["token_type_ids"][:, :4]), ["token_type_ids", r"\[3, 4\]"]),
    "ids-float": (replaced(input_ids=ids(3, 20).float()), ["input_ids", "float32"]),
    "ids-list": (replaced(input_ids=ids(3, 20).tolist()), ["input_ids", "list"]),
    "ids-1d": (replaced(input_ids=ids(3, 20)[0]), ["input_ids", r"\[20\]"]),
    "ids-none": (replaced(input_ids=...), []),
    "mask-list": (replaced(attention_mask=MASK.tolist()), ["attention_mask", "list"]),
    "types-float": (replaced(token_type_ids=good()["token_type_ids"].float()), ["token_type_ids", "float32"]),
}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("head", HEADS)
def test_the_stock_error_with_the_value_in_it(head, bad, backend):
    inputs, words = BAD[bad]
    model = make(head)
    stock = copy.deepcopy(model)
    clinfast.optimize(model, backend=backend)
    expected = run(model, **good())
    with pytest.raises(Exception) as theirs:
        run(stock, **inputs)
    for _ in range(2):
        with pytest.raises(Exception) as ours:
            run(model, **inputs)
        assert type(ours.value) is type(theirs.value), (ours.value, theirs.value)
        text = str(ours.value)
        for word in words:
            assert re.search(word, text), text
    assert_equal(run(model, **good()), expected)


def outcome(model, inputs):
    try:
        return run(model, **inputs)
    except Exception as error:
        return type(error)


# What stock takes, or refuses, in ways that no error of ours should come before.
ODD = {
    "no-notes": {"input_ids": torch.zeros(0, 5, dtype=torch.long)},
    "no-notes-mask": {"input_ids": torch.zeros(0, 5, dtype=torch.long), "attention_mask": torch.zeros(0, 5)},
    "no-tokens": {"input_ids": torch.zeros(2, 0, dtype=torch.long)},
    "mask-4d": {"input_ids": ids(3, 20), "attention_mask": MASK[:, None, None, :]},
    "mask-3d": {"input_ids": ids(3, 20), "attention_mask": MASK[:, None, :]},
    "mask-1d": {"input_ids": ids(3, 20), "attention_mask": MASK[0]},
    "mask-one-row": {"input_ids": ids(3, 20), "attention_mask": MASK[:1]},
    "mask-float": {"input_ids": ids(3, 20), "attention_mask": MASK.float()},
    "mask-twos": {"input_ids": ids(3, 20), "attention_mask": MASK * 2},
    "mask-negative": {"input_ids": ids(3, 20), "attention_mask": -MASK},
    "types-one-row": {"input_ids": ids(3, 20), "token_type_ids": (ids(1, 20) % 2)},
    "ids-uint8": {"input_ids": ids(3, 20).to(torch.uint8)},
    "ids-bool": {"input_ids": ids(3, 20) > 3},
    "ids-int16": {"input_ids": ids(3, 20).to(torch.int16)},
    "ids-3d": {"input_ids": ids(3, 20)[None]},
    "ids-0d": {"input_ids": torch.tensor(3)},
    "unknown": {"input_ids": ids(3, 20), "nonsense": 3},
    "nothing": {},
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("head", ["base", "sequence", "token"])
def test_odd_inputs_end_as_in_stock(head, odd):
    model = make(head)
    stock = copy.deepcopy(model)
    clinfast.optimize(model)
    expected = run(model, **good())
    ours, theirs = outcome(model, ODD[odd]), outcome(stock, ODD[odd])
    if isinstance(theirs, type):
        assert ours is theirs
    else:
        mask = MASK.bool()
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].shape == value.shape and ours[name].dtype is value.dtype
            rows = mask if value.shape[:2] == mask.shape and "mask" in odd else ...
            torch.testing.assert_close(ours[name][rows], value[rows], rtol=0, atol=1e-4)
    assert_equal(run(model, **good()), expected)


def test_strict_raises_stocks_error_for_a_mistake_and_its_own_for_the_rest():
    model = clinfast.optimize(make(), strict=True)
    for bad in ("too-long", "mask-short", "ids-float"):
        with pytest.raises(Exception) as caught:
            run(model, **BAD[bad][0])
        assert not isinstance(caught.value, clinfast.StrictError)
    left = {**good(), "attention_mask": torch.flip(MASK, [1])}
    with pytest.raises(clinfast.StrictError, match="left padding"):
        run(model, **left)
    with pytest.raises(clinfast.StrictError, match="gradients"):
        model(**good())
    with clinfast.disabled(model):
        run(model, **left)
    run(model, **good())
    assert clinfast.report(model).calls_fast == 1


def test_two_bad_values_name_the_first():
    model = clinfast.optimize(make())
    inputs = good()
    inputs["input_ids"][2, 4] = 200
    inputs["input_ids"][1, 3] = 300
    with pytest.raises(IndexError, match=r"input_ids\[1, 3\] is 300"):
        run(model, **inputs)


def test_bad_ids_in_views_are_found():
    model = clinfast.optimize(make())
    wide = ids(3, 40)
    wide[1, 6] = 1000
    with pytest.raises(IndexError, match=r"input_ids\[1, 3\] is 1000"):
        run(model, input_ids=wide[:, ::2])
    tall = ids(20, 3)
    tall[4, 2] = -5
    with pytest.raises(IndexError, match=r"input_ids\[2, 4\] is -5"):
        run(model, input_ids=tall.t())
