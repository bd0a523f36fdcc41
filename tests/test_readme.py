"""The README's table of families, heads and backends, made by running each of them.

`CLINFAST_WRITE_README=1 pytest tests/test_readme.py` writes it anew.
"""

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from bert_models import ids, mapped, randomize, right_padded, run
from transformers_version import FOUR

import clinfast
from clinfast import models
from clinfast.canary import compare
from clinfast.ops import registry

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- families: made by tests/test_readme.py -->", "<!-- end of families -->"
HEADS = {
    "Model": "base model",
    "ForSequenceClassification": "sequence classification",
    "ForTokenClassification": "token classification",
    "ForQuestionAnswering": "question answering",
    "ForMultipleChoice": "multiple choice",
    "ForMaskedLM": "masked LM",
    "ForNextSentencePrediction": "next sentence",
    "ForPreTraining": "pretraining",
}
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 96,
    "max_position_embeddings": 40,
    "relative_attention": True, "pos_att_type": "p2c|c2p",
    "dim": 64, "n_heads": 2, "n_layers": 2, "hidden_dim": 96, "embedding_size": 32,
}  # fmt: skip


def family_of(home):
    return home.split(".")[2].replace("_", "-")


def model_class(home, head):
    classes = vars(importlib.import_module(home))
    ours = (name for name, value in classes.items() if isinstance(value, type) and value.__module__ == home)
    prefix = next(name for name in ours if name.endswith("PreTrainedModel")).removesuffix("PreTrainedModel")
    return classes.get(prefix + head)


def attention_calls(backend):
    """Of every variant, and of layers in one call."""
    names = (name for name in registry.calls if name.endswith(f"[{backend}]"))
    return sum(registry.calls[name] for name in names if name.startswith(("attention", "encoder_layer")))


def served(cls, backend):
    """Whether a model of this class is fast with this backend, in fp32 and bf16, and right."""
    fields = set(cls.config_class().to_dict()) | set(cls.config_class.attribute_map)
    sizes = {name: size for name, size in SIZES.items() if name in fields}
    if (getattr(cls.config_class(), "pad_token_id", 0) or 0) >= sizes["vocab_size"]:
        sizes |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    config = cls.config_class(**sizes)
    torch.manual_seed(0)
    stock = cls(config).eval()
    randomize(stock)
    inputs = {"input_ids": ids(4, 12), "attention_mask": right_padded([12, 5, 1, 9])}
    if cls.__name__.endswith("MultipleChoice"):
        inputs = {name: value.view(2, 2, 12) for name, value in inputs.items()}
    for precision in ("fp32", "bf16"):
        model = clinfast.optimize(copy.deepcopy(stock), precision=precision, backend=backend, strict=True)
        before = attention_calls(backend)
        ours, theirs = run(model, **inputs), run(stock, **inputs)
        report = clinfast.report(model)
        if report.calls_fast != 1 or report.units[0].path or attention_calls(backend) == before:
            return False
        for name, expected in theirs.items():
            mask = inputs["attention_mask"] if name in model.forward.match.per_token else None
            difference, scale = compare(ours[name], expected, mask)
            assert difference <= (1e-5 if precision == "fp32" else 0.1) * scale, (cls.__name__, name, difference)
    return True


def installed(home):
    """Whether this release of transformers has the family."""
    return importlib.util.find_spec(home.rpartition(".")[0]) is not None


def table():
    heads = list(HEADS)
    lines = ["| | " + " | ".join(HEADS.values()) + " |", "| --- " * (len(heads) + 1) + "|"]
    for home in filter(installed, models.FAMILIES):
        cells = []
        for head in heads:
            cls = model_class(home, head)
            fast = [] if cls is None else [name for name in registry.order("auto", "cpu") if served(cls, name)]
            cells.append("" if cls is None else ", ".join(fast) or "base model only")
        lines.append(f"| {family_of(home)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_table_of_families_is_what_runs(one_thread):
    before, _, rest = README.read_text().partition(START)
    old, _, after = rest.partition(END)
    assert after, f"the README has no {START} ... {END}"
    made = table()
    if os.environ.get("CLINFAST_WRITE_README"):
        README.write_text(f"{before}{START}\n{made}\n{END}{after}")
        old = made
    old = known(old.strip(), made)
    assert old == made, "the README's table is old; CLINFAST_WRITE_README=1 pytest tests/test_readme.py"


def known(table, made):
    """`table` without what this release of transformers lacks; all of it on transformers 5."""
    if not FOUR:
        return table
    rows = {line.split("|")[1]: line.split("|") for line in made.splitlines()}
    kept = [line.split("|") for line in table.splitlines() if line.split("|")[1] in rows]
    return "\n".join(
        "|".join(cell if own.strip() else own for cell, own in zip(line, rows[line[1]], strict=True)) for line in kept
    )


def test_a_wrong_result_does_not_get_into_the_table(monkeypatch):
    cls = model_class(next(iter(models.FAMILIES)), "ForTokenClassification")
    clean = clinfast.engine.encoder.Encoder.run
    monkeypatch.setattr(clinfast.canary, "check", lambda *_: 0.0)
    monkeypatch.setattr(
        clinfast.engine.encoder.Encoder, "run", lambda self, request: mapped(clean(self, request), lambda x: x + 1e-2)
    )
    with pytest.raises(AssertionError, match="logits"):
        served(cls, "cpu")
