"""Classes that came with a model folder (`trust_remote_code`) are refused by name and run stock."""

import json
import textwrap

import pytest
import transformers
from bert_models import assert_equal, ids, make, right_padded, run

import clinfast
from clinfast.engine.spec import Unsupported

INPUTS = {"input_ids": ids(2, 9), "attention_mask": right_padded([9, 4])}
DERIVED = """
    from transformers import BertModel


    class RemoteModel(BertModel):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.last_hidden_state = -out.last_hidden_state
            return out
    """
OF_ITS_OWN = """
    import torch
    from transformers import BertConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput


    class RemoteModel(PreTrainedModel):
        config_class = BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.embeddings = torch.nn.Embedding(config.vocab_size, config.hidden_size)
            self.post_init()

        def forward(self, input_ids, attention_mask=None):
            return BaseModelOutput(last_hidden_state=self.embeddings(input_ids))
    """


@pytest.fixture(params=[(DERIVED, "derived from BertModel"), (OF_ITS_OWN, "trust_remote_code")],
                ids=["derived", "of its own"])  # fmt: skip
def remote(request, tmp_path, monkeypatch):
    source, words = request.param
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    # Older transformers remember the class for every later AutoModel of its config.
    known = transformers.MODEL_MAPPING
    monkeypatch.setattr(known, "_extra_content", dict(known._extra_content))
    folder = tmp_path / "remote_model"
    make().save_pretrained(folder)
    (folder / "modeling_remote.py").write_text(textwrap.dedent(source))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_remote.RemoteModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval(), words


def test_is_refused_by_name_and_runs_stock(remote):
    model, words = remote
    assert type(model).__module__.startswith("transformers_modules.")
    expected = run(model, **INPUTS)
    with pytest.raises(Unsupported, match=rf"transformers_modules.*RemoteModel.*{words}"):
        clinfast.optimize(model, strict=True)
    with pytest.warns(clinfast.ClinfastWarning, match=r"RemoteModel is left stock: its class transformers_modules"):
        clinfast.optimize(model)
    assert_equal(run(model, **INPUTS), expected)
    (unit,) = clinfast.report(model).units
    assert words in unit.refused and unit.calls_fast == 0
