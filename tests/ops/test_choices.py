import dataclasses
import importlib
import json
import re
import types

import pytest
import torch

import clinfast
from clinfast.backends import cuda
from clinfast.backends.cuda import native
from clinfast.ops import choices, registry
from clinfast.report import UnitReport
from clinfast.triton_kernels import configs

for name in (*registry.STEMS, "attention_biased", "attention_disentangled"):
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
        assert set(choice.ops) <= {*registry.OPS, *registry.FORMS, "linear.prepack", "pack.into"}
        assert set(choice.dtypes) <= set(choices.ANY)


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


def test_functions_by_dtype_and_size():
    one, two, three = (lambda *_, **__: 1), (lambda *_, **__: 2), (lambda *_, **__: 3)
    assert choices.by_call({(torch.float32, True): one, (torch.float16, False): one}) is one
    call = choices.by_call({(torch.float32, True): one, (torch.float16, True): two, (torch.float16, False): three})
    assert call(torch.zeros(1)) == 1 and call(torch.zeros(1).half(), 3) == 2
    assert call(torch.zeros(choices.REQUEST_ROWS + 1).half()) == 3
    # Ids count by tokens, and their tables say the dtype; without one, they count as fp32.
    assert call(torch.zeros(2, 3, dtype=torch.int64), None) == 1
    assert call(torch.zeros(2, choices.REQUEST_ROWS, dtype=torch.int64), None, word=torch.zeros(3).half()) == 3
    assert call(torch.zeros(2, 3, dtype=torch.int64), None, torch.zeros(3).half()) == 2


def write(path, card="NVIDIA H200", rows=None, **more):
    table = json.loads((configs.TABLES / "sm_90.json").read_text())
    row = choices.measured_row("attention", torch.bfloat16, choices.REQUEST_ROWS, {"cuda": 5.0, "triton": 9.0}, "cuda")
    path.write_text(json.dumps(table | {"card": card, "backends": [row] if rows is None else rows} | more))


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    write(path)
    monkeypatch.setenv("CLINFAST_TUNING_TABLE", str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    caches = (choices.measured, choices.measured_choices)
    for cache in caches:
        cache.cache_clear()
    yield path
    for cache in caches:
        cache.cache_clear()


def test_what_was_measured_comes_before_what_was_reasoned(table):
    names, half, card = ["triton", "cuda", "torch"], torch.bfloat16, (9, 0)
    assert choices.ranked("attention", names, half, card, choices.REQUEST_ROWS)[0] == "cuda"
    assert choices.ranked("attention", names, half, card)[0] == "triton"  # a batch was not measured
    assert choices.ranked("attention", names, torch.float16, card, choices.REQUEST_ROWS)[0] == "triton"
    row = choices.first("attention", half, card, 1)
    assert row.why == "measured on NVIDIA H200: cuda 5.0 us, triton 9.0 us"


def test_figures_of_another_card_are_not_used_and_said_so(table, caplog):
    write(table, card="NVIDIA A100")
    assert choices.ranked("attention", ["triton", "cuda"], torch.bfloat16, (9, 0), 1)[0] == "triton"
    assert "was measured on NVIDIA A100, not NVIDIA H200: its backends are not used" in caplog.text


@pytest.mark.parametrize("row", [{}, {"op": "attention"}, 3])
def test_a_row_that_is_none_is_named(table, row):
    write(table, rows=[row])
    with pytest.raises(ValueError, match="is not a tuning table of clinfast: its backends have the row"):
        choices.first("attention", torch.bfloat16, (9, 0))


@pytest.mark.parametrize(
    ("variable", "measured", "expected"),
    [("", None, False), ("", True, True), ("", False, False), ("0", True, False), ("1", None, True)],
)
def test_programmatic_launch_is_off_unless_measured_or_asked_for(table, monkeypatch, variable, measured, expected):
    if measured is not None:
        write(table, programmatic_launch={"chosen": measured})
    monkeypatch.setenv("CLINFAST_CUDA_PDL", variable)
    assert native.wants_programmatic_launch() is expected


def test_programmatic_launch_is_yes_or_no(monkeypatch):
    monkeypatch.setenv("CLINFAST_CUDA_PDL", "maybe")
    with pytest.raises(ValueError, match="CLINFAST_CUDA_PDL is 'maybe'; choose 1"):
        native.wants_programmatic_launch()


def test_without_its_kernels_the_backend_offers_nothing_and_torch_serves():
    if cuda.unavailable() is None:
        pytest.skip("the CUDA kernels are here")
    assert cuda.implementations() == {}
    assert registry.implementation("layer_norm", "auto", "cuda").__module__ != "clinfast.backends.cuda.layer_norm"
    with pytest.raises(RuntimeError, match="no backend of cuda serves the op 'layer_norm'"):
        registry.implementation("layer_norm", "cuda", "cuda")


@pytest.fixture
def two_partial_backends(monkeypatch):
    """On a GPU, a first backend with a kernel for even rows, a second for few, a third for all; each offers `gelu`."""

    def offering(name, refuses):
        def gelu(x, bias=None, approximate="none"):
            if refuses(x):
                raise registry.NotOffered(f"{name} has no kernel for {x.shape[0]} rows")
            return (name, x)

        return types.SimpleNamespace(implementations=lambda: {"gelu": gelu})

    homes = {"first": offering("first", lambda x: x.shape[0] % 2), "second": offering("second", lambda x: len(x) > 5)}
    homes["third"] = types.SimpleNamespace(implementations=lambda: {"gelu": lambda x, *rest: ("third", x)})
    backends = {name: registry.Backend(name, ("cuda",), partial=name != "third") for name in homes}
    monkeypatch.setattr(registry, "BACKENDS", backends)
    monkeypatch.setattr(registry, "importlib", types.SimpleNamespace(import_module=homes.__getitem__))
    monkeypatch.setattr(registry, "substitutes", [])
    caches = (registry.implementation, registry._offer, registry._with_next)
    for cache in caches:
        cache.cache_clear()
    yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("backend", ["auto", "first"])
def test_a_call_without_a_kernel_goes_to_the_next_backend_and_the_reason_is_kept(two_partial_backends, backend, caplog):
    gelu = registry.implementation("gelu", backend, "cuda")
    registry.calls.clear()
    assert gelu(torch.zeros(2, 1))[0] == "first" and not registry.substitutes
    for _ in range(2):
        assert gelu(torch.zeros(3, 1))[0] == "second" and gelu(torch.zeros(7, 1))[0] == "third"
    assert registry.calls == {"gelu[first]": 1, "gelu[second]": 2, "gelu[third]": 2}
    assert registry.substitutes == [
        "second serves gelu where first has no kernel for 3 rows",
        "second serves gelu where first has no kernel for 7 rows",
        "third serves gelu where second has no kernel for 7 rows",
    ]
    assert [record.message for record in caplog.records] == [f"clinfast: {line}" for line in registry.substitutes]
    report = clinfast.report(torch.nn.Linear(1, 1))
    unit = UnitReport("", "BertModel", 0, 0, {}, {}, None, "a reason")
    assert report.substitutes == tuple(registry.substitutes)
    assert registry.substitutes[2] in str(dataclasses.replace(report, units=(unit,)))


def test_where_no_other_backend_offers_it_the_call_says_so(two_partial_backends):
    del registry.BACKENDS["third"], registry.BACKENDS["second"]
    gelu = registry.implementation("gelu", "auto", "cuda")
    with pytest.raises(NotImplementedError, match="gelu: first has no kernel for 1 rows, and no other backend"):
        gelu(torch.zeros(1, 1))


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
