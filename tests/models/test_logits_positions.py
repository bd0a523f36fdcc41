"""`logits_positions`: the vocabulary at chosen positions only, in every masked-LM family."""

import pytest
import torch
from bert_models import VOCAB, assert_equal, ids, right_padded, run
from bert_models import make as bert
from relatives import FAMILIES, make

import clinfast

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning")]

INPUTS = {"input_ids": ids(3, 12), "attention_mask": right_padded([12, 5, 9])}
CHOSEN = torch.zeros(3, 12, dtype=torch.bool)
CHOSEN[0, [1, 11]] = CHOSEN[1, 4] = CHOSEN[2, 0] = True


@pytest.fixture(params=["bert", *FAMILIES])
def model(request):
    made = bert("mlm") if request.param == "bert" else make(request.param, "mlm")
    return clinfast.optimize(made)


@pytest.mark.parametrize("positions", [CHOSEN, torch.zeros_like(CHOSEN), INPUTS["attention_mask"].bool()],
                         ids=["some", "none", "all"])  # fmt: skip
def test_are_the_rows_of_the_full_logits_to_the_bit(model, positions):
    full = run(model, **INPUTS)["logits"]
    logits = run(model, **INPUTS, logits_positions=positions)["logits"]
    assert logits.shape == (int(positions.sum()), VOCAB) and logits.dtype is full.dtype
    assert torch.equal(logits, full[positions])
    report = clinfast.report(model)
    assert report.calls_fast == 2 and report.calls_stock == 0


def test_stock_calls_answer_in_the_same_shape(model):
    with clinfast.disabled(model):
        full = run(model, **INPUTS)["logits"]
        logits = run(model, **INPUTS, logits_positions=CHOSEN)["logits"]
    assert torch.equal(logits, full[CHOSEN])


def test_none_means_everywhere(model):
    assert_equal(run(model, **INPUTS, logits_positions=None), run(model, **INPUTS))


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        (CHOSEN[:, :5], r"logits_positions has shape \[3, 5\], but input_ids has shape \[3, 12\]"),
        (CHOSEN.long(), "logits_positions is torch.int64; bool"),
        ([1, 2], "logits_positions is a builtins.list"),
        (INPUTS["attention_mask"] == 0, r"logits_positions\[1, 5\] is True, but attention_mask masks that position"),
    ],
    ids=["another shape", "another dtype", "a list", "padding"],
)
def test_mistakes_name_the_argument(model, positions, words):
    with pytest.raises(ValueError, match=words):
        run(model, **INPUTS, logits_positions=positions)
    if "masks that" not in words:
        with clinfast.disabled(model), pytest.raises(ValueError, match=r"logits_positions is .* is needed"):
            run(model, **INPUTS, logits_positions=positions)
    run(model, **INPUTS, logits_positions=CHOSEN)


def test_other_heads_have_no_such_argument():
    model = clinfast.optimize(bert("token"))
    try:
        logits = run(model, **INPUTS, logits_positions=CHOSEN)["logits"]
    except TypeError:  # transformers 4.x refuses arguments that it does not know
        return
    assert logits.shape[:2] == (3, 12) and clinfast.report(model).calls_stock == 1
