import importlib
import re

import pytest
import torch

from clinfast.backends import cuda
from clinfast.backends.cuda import native
from clinfast.ops import choices, registry

for name in (*registry.STEMS, "attention_biased"):
    importlib.import_module(f"clinfast.ops.{name}")

CARDS = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


def test_every_op_dtype_and_card_has_a_row():
    for op in [*registry.OPS, "linear.prepack"]:
        for dtype in registry.KERNEL_DTYPES["cuda"]:
            for card in CARDS:
                choice = choices.first(op, dtype, card)
                assert choice is not None, (op, dtype, card)
                assert choice.why


def test_rows_name_ops_that_there_are():
    for choice in choices.TABLE:
        assert set(choice.ops) <= {*registry.OPS, "linear.prepack"} and set(choice.dtypes) <= set(choices.ANY)


@pytest.mark.parametrize(
    ("dtype", "card", "expected"),
    [
        (torch.float16, (7, 5), ["cuda", "triton", "torch"]),
        (torch.bfloat16, (8, 0), ["cuda", "triton", "torch"]),
        (torch.bfloat16, (9, 0), ["triton", "cuda", "torch"]),
        (torch.float32, (9, 0), ["cuda", "triton", "torch"]),
        (torch.float16, (12, 0), ["cuda", "triton", "torch"]),
    ],
)
def test_the_choice_comes_first_and_the_others_keep_their_order(dtype, card, expected):
    assert choices.ranked("attention", ["cuda", "triton", "torch"], dtype, card) == expected


def test_a_choice_that_is_not_among_the_names_changes_nothing():
    assert choices.ranked("attention", ["cuda", "torch"], torch.float16, (9, 0)) == ["cuda", "torch"]


def test_functions_by_dtype():
    one, two = (lambda *args: 1), (lambda *args: 2)
    assert choices.by_dtype({torch.float32: one, torch.float16: one}) is one
    both = choices.by_dtype({torch.float32: one, torch.float16: two})
    assert both(torch.zeros(1)) == 1 and both(torch.zeros(1).half(), 3) == 2


def test_without_its_kernels_the_backend_offers_nothing_and_torch_serves():
    if cuda.unavailable() is None:
        pytest.skip("the CUDA kernels are here")
    assert cuda.implementations() == {}
    assert registry.implementation("layer_norm", "auto", "cuda").__module__ != "clinfast.backends.cuda.layer_norm"
    with pytest.raises(RuntimeError, match="no backend of cuda serves the op 'layer_norm'"):
        registry.implementation("layer_norm", "cuda", "cuda")


def versions(driver, runtime=13000, devices=1, error=0):
    return {"driver": driver, "runtime": runtime, "devices": devices, "error": error, "text": "no device"}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (versions(0, error=35), "there is no NVIDIA driver"),
        (versions(12080, error=35), r"supports CUDA 12.8, and .* CUDA 13.0; update the driver \(branch 580 or later\)"),
        (versions(11080, 12080, error=35), r"\(branch 525 or later\)"),
        (versions(13000, devices=0, error=100), "no usable GPU: no device"),
        (versions(13000, devices=0), "no usable GPU: there is none"),
    ],
)
def test_the_reason_names_what_is_wrong_with_the_driver(found, message):
    assert re.search(message, native.refusal(found) or "")


def test_a_driver_that_is_new_enough_is_no_reason():
    assert native.refusal(versions(13000)) is None and native.refusal(versions(13020, 12080)) is None
