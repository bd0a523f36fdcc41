"""Registration when transformers is imported, each case in a process of its own."""

import importlib.util
import os
import pickle
import subprocess
import sys
import textwrap
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
import transformers
from attention_models import LAYERS, counted, hidden, ids, make, masks
from transformers_version import FOUR

from clinfast.integrations import import_hook

takes_effect = pytest.mark.skipif(FOUR, reason="attn_implementation='clinfast' takes effect on transformers 5")
ROOT = Path(__file__).parents[2]
SMALL = """
import transformers
config = transformers.BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=48)
def check():
    import torch
    from clinfast.ops import registry
    model = transformers.BertModel._from_config(config, attn_implementation="clinfast").eval()
    with torch.no_grad():
        model(torch.ones(2, 5, dtype=torch.long), attention_mask=torch.tensor([[1] * 5, [1, 1, 0, 0, 0]]))
    assert registry.calls["attention[cpu]"] == 1
"""


def run(code, **environment):
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_clinfast_alone_imports_no_transformers():
    run("""
    import sys, clinfast
    assert not [name for name in sys.modules if name.partition(".")[0] == "transformers"]
    """)


@takes_effect
@pytest.mark.parametrize("first", ["clinfast", "transformers", "transformers.modeling_utils"])
def test_either_import_may_come_first(first):
    code = f"""
    import {first}, sys
    before = "transformers.modeling_utils" in sys.modules
    import clinfast
    assert ("transformers.modeling_utils" in sys.modules) == before
    """
    rest = """
    from clinfast.integrations.import_hook import _Finder
    check()
    module = sys.modules["transformers.modeling_utils"]
    assert not [finder for finder in sys.meta_path if isinstance(finder, _Finder)]
    assert type(module.__spec__.loader) is type(module.__loader__) is type(sys.modules["textwrap"].__loader__)
    import inspect, pickle
    assert "class PreTrainedModel" in inspect.getsource(module)
    assert pickle.loads(pickle.dumps(module.__spec__)).name == module.__name__
    """
    run(textwrap.dedent(code) + "import textwrap\n" + SMALL + textwrap.dedent(rest))


@takes_effect
def test_first_imports_in_many_threads():
    run("import clinfast, threading" + SMALL + textwrap.dedent("""
    failed = []
    def work():
        try:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
            assert "clinfast" in ALL_ATTENTION_FUNCTIONS
        except BaseException as error:
            failed.append(error)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not failed, failed
    check()
    """))


@takes_effect
def test_clinfast_imported_while_transformers_is():
    run("""
    import sys, threading, time
    def late():
        while "transformers.modeling_utils" not in sys.modules:
            time.sleep(0.001)
        import clinfast
    thread = threading.Thread(target=late)
    thread.start()
    import transformers.modeling_utils as modeling_utils
    thread.join()
    assert "clinfast" in modeling_utils.ALL_ATTENTION_FUNCTIONS
    """)


@takes_effect
def test_reload():
    run("import clinfast, importlib" + SMALL + textwrap.dedent("""
    check()
    import transformers.modeling_utils as modeling_utils
    importlib.reload(modeling_utils)
    assert "clinfast" not in modeling_utils.ALL_ATTENTION_FUNCTIONS
    from clinfast.integrations import attention_interface
    attention_interface.register()
    attention_interface.register()
    assert "clinfast" in modeling_utils.ALL_ATTENTION_FUNCTIONS
    method = modeling_utils.PreTrainedModel.get_correct_attn_implementation
    assert not hasattr(method._clinfast_stock, "_clinfast_stock")
    """))


class _FailsOnce:
    """A loader of the least that Python asks for, on a finder that knows one module."""

    def __init__(self, name, source):
        self.name, self.source, self.tries = name, source, 0

    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.name:
            return ModuleSpec(fullname, self)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        self.tries += 1
        assert module.__spec__.loader is module.__loader__ is self
        if self.tries == 1:
            raise ImportError("not yet")
        exec(self.source, module.__dict__)


@pytest.fixture
def odd_loader(monkeypatch):
    name = "clinfast_test_module_that_is_not_there"
    finder = _FailsOnce(name, "value = 3")
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    yield finder
    sys.modules.pop(name, None)


def waiting_for(name):
    return [finder for finder in sys.meta_path if getattr(finder, "name", None) == name and hasattr(finder, "action")]


def test_a_failed_import_is_tried_again(odd_loader):
    seen = []
    import_hook.when_imported(odd_loader.name, lambda module: seen.append(module.value))
    with pytest.raises(ImportError, match="not yet"):
        __import__(odd_loader.name)
    assert not seen
    __import__(odd_loader.name)
    assert seen == [3] and not waiting_for(odd_loader.name)
    import_hook.when_imported(odd_loader.name, lambda module: seen.append(module.value + 1))
    assert seen == [3, 4]


def test_a_spec_that_is_only_looked_at(odd_loader):
    import_hook.when_imported(odd_loader.name, lambda module: None)
    odd_loader.tries = 1
    spec = importlib.util.find_spec(odd_loader.name)
    assert spec.loader.source == "value = 3"
    stranger = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stranger)
    assert stranger.value == 3
    assert waiting_for(odd_loader.name), "another copy is not the import"


@takes_effect
def test_files_and_pickles(tmp_path, one_thread):
    model = make("bert")
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    model.save_pretrained(plain)
    model.set_attn_implementation("clinfast")
    inputs = {"input_ids": ids(4, 9), "attention_mask": masks(9)["right"]}
    with counted(packed=LAYERS):
        expected = hidden(model, **inputs)
    model.save_pretrained(ours)
    for file in plain.iterdir():
        assert file.read_bytes() == (ours / file.name).read_bytes(), file.name
    with counted(packed=LAYERS):
        assert torch.equal(hidden(pickle.loads(pickle.dumps(model)), **inputs), expected)
    loaded = type(model).from_pretrained(ours, attn_implementation="clinfast").eval()
    with counted(packed=LAYERS):
        assert torch.equal(hidden(loaded, **inputs), expected)
    torch.save(model, tmp_path / "model.pt")
    run(f"""
    import sys, torch, transformers
    ids = torch.ones(1, 3, dtype=torch.long)
    transformers.BertModel.from_pretrained({str(ours)!r})(ids)
    model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
    try:
        model(ids)
    except KeyError as error:
        assert "clinfast" in str(error)
    else:
        raise AssertionError("it should have asked for clinfast")
    assert "clinfast" not in sys.modules
    model.set_attn_implementation("sdpa")
    model(ids)
    import clinfast
    model.set_attn_implementation("clinfast")
    with torch.no_grad():
        model(ids)
    assert clinfast.integrations.attention_interface.calls["packed"] == {LAYERS}
    """)


@pytest.mark.skipif(not FOUR, reason="takes effect here")
def test_older_transformers_are_named():
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    message = "takes effect on transformers 5 or later, and this is 4"
    with pytest.raises(ValueError, match=message):
        transformers.BertModel._from_config(transformers.BertConfig(**fields), attn_implementation="clinfast")
    model = transformers.BertModel(transformers.BertConfig(**fields))
    if hasattr(model, "set_attn_implementation"):
        with pytest.raises(ValueError, match=message):
            model.set_attn_implementation("clinfast")
    assert model.config._attn_implementation == "sdpa"
