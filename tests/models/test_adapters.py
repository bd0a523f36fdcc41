"""What an adapter reads off a live module, and what it refuses by name."""

import json
import subprocess
import sys

import pytest
import torch
from bert_models import make
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertLMHeadModel, BertModel
from transformers.activations import ACT2FN
from transformers_version import FOUR

from clinfast import models
from clinfast.engine.spec import Branch, Dense, EncoderOutput, EncoderSpec, HeadSpec, Request, Unsupported

SPEC = {
    "family": "bert",
    "num_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "head_dim": 32,
    "activation": "gelu",
    "eps": 1e-12,
    "scale": 32**-0.5,
    "vocab_size": 97,
    "max_positions": 64,
    "type_vocab_size": 2,
    "position_offset": 0,
    "position_padding_idx": None,
    "embedding_size": 64,
}
POOLER = Dense("pooler", 64, 64, "tanh")
TRANSFORM, DECODER = Dense("transform", 64, 64, "gelu", 1e-12), Dense("decoder", 64, 97)
HEAD_SPECS = {
    "base": HeadSpec("base", True, (Branch("first_token", (POOLER,)),)),
    "no-pooler": HeadSpec("base", True),
    "sequence": HeadSpec(
        "sequence_classification", branches=(Branch("first_token", (POOLER, Dense("classifier", 64, 2))),)
    ),
    "token": HeadSpec("token_classification", branches=(Branch("per_token", (Dense("classifier", 64, 2),)),)),
    "qa": HeadSpec("question_answering", branches=(Branch("per_token", (Dense("qa_outputs", 64, 2),), "min"),)),
    "mlm": HeadSpec("masked_lm", branches=(Branch("per_token", (TRANSFORM, DECODER), selectable=True),)),
    "nsp": HeadSpec(
        "next_sentence_prediction",
        branches=(Branch("first_token", (POOLER, Dense("seq_relationship", 64, 2))),),
    ),
    "choice": HeadSpec(
        "multiple_choice",
        branches=(Branch("first_token", (POOLER, Dense("classifier", 64, 1))),),
        choices=True,
    ),
    "pretraining": HeadSpec(
        "pretraining",
        branches=(
            Branch("per_token", (TRANSFORM, DECODER)),
            Branch("first_token", (POOLER, Dense("seq_relationship", 64, 2))),
        ),
    ),
}


def refusal(model):
    with pytest.raises(Unsupported) as caught:
        models.match(model)
    return str(caught.value)


def first_layer(model):
    return getattr(model, "bert", model).encoder.layer[0]


@pytest.mark.parametrize("head", HEAD_SPECS)
def test_specs(head):
    match = models.match(make(head))
    assert match.encoder == EncoderSpec(**SPEC)
    assert match.head == HEAD_SPECS[head]
    assert EncoderSpec.from_json(match.encoder.to_json()) == match.encoder
    assert HeadSpec.from_dict(json.loads(json.dumps(match.head.to_dict()))) == match.head


@pytest.mark.parametrize("head", HEAD_SPECS)
def test_every_parameter_has_its_canonical_name(head):
    model = make(head)
    match = models.match(model)
    assert tuple(match.parameters) != ()
    assert set(match.parameters) == set(match.encoder.parameter_names() + match.head.parameter_names())
    found = {id(ref.tensor()) for ref in match.parameters.values()}
    # transformers keeps a decoder's bias under a second name.
    unread = {id(p) for name, p in model.named_parameters() if name != "cls.predictions.bias"} - found
    assert not unread and found <= {id(p) for p in model.parameters()}, "all weights of the model are read"


@pytest.mark.parametrize(
    ("canonical", "path"),
    [
        ("embedding.token_type.weight", "bert.embeddings.token_type_embeddings.weight"),
        ("layers.1.key.bias", "bert.encoder.layer.1.attention.self.key.bias"),
        ("layers.1.value.weight", "bert.encoder.layer.1.attention.self.value.weight"),
        ("layers.0.attention_output.weight", "bert.encoder.layer.0.attention.output.dense.weight"),
        ("layers.0.attention_norm.bias", "bert.encoder.layer.0.attention.output.LayerNorm.bias"),
        ("layers.0.output_norm.weight", "bert.encoder.layer.0.output.LayerNorm.weight"),
        ("layers.0.ffn_in.weight", "bert.encoder.layer.0.intermediate.dense.weight"),
        ("pooler.weight", "bert.pooler.dense.weight"),
        ("classifier.bias", "classifier.bias"),
    ],
)
def test_names_point_at_the_live_weights(canonical, path):
    model = make("sequence")
    assert models.match(model).parameters[canonical].tensor() is model.get_parameter(path)


def test_a_reference_follows_the_live_weight():
    model = make()
    ref = models.match(model).parameters["pooler.bias"]
    model.pooler.dense.bias = nn.Parameter(torch.ones(64))
    assert ref.tensor() is model.pooler.dense.bias


def test_sizes_come_from_the_modules():
    model = make(num_hidden_layers=3)
    model.encoder.layer = model.encoder.layer[:1]
    model.config.num_attention_heads = 7
    spec = models.match(model).encoder
    assert (spec.num_layers, spec.num_heads) == (1, 2)


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}
REFERENCES = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
}


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_activations_are_what_they_are_taken_for(name):
    if name not in ACTIVATIONS:
        with pytest.raises(Unsupported, match="intermediate_act_fn is"):
            models.match(make(hidden_act=name))
        return
    model = make(hidden_act=name)
    assert models.match(model).encoder.activation == ACTIVATIONS[name]
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    ours = REFERENCES[ACTIVATIONS[name]](x)
    torch.testing.assert_close(first_layer(model).intermediate.intermediate_act_fn(x), ours, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.functional.gelu, "gelu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (torch.relu, "relu"),
        (nn.functional.relu, "relu"),
    ],
)
def test_activations_given_as_functions(function, name):
    model = make()
    for layer in model.encoder.layer:
        del layer.intermediate.intermediate_act_fn
        layer.intermediate.intermediate_act_fn = function
    assert models.match(model).encoder.activation == name


@pytest.mark.parametrize("function", [torch.sigmoid, lambda x: x, nn.functional.silu])
def test_functions_that_are_not_known(function):
    model = make()
    del first_layer(model).intermediate.intermediate_act_fn
    first_layer(model).intermediate.intermediate_act_fn = function
    assert "encoder.layer.0.intermediate.intermediate_act_fn is" in refusal(model)


def set_at(model, path, value):
    owner, _, name = path.rpartition(".")
    target = model.get_submodule(owner)
    if name in target._modules and not isinstance(value, nn.Module):
        del target._modules[name]
    setattr(target, name, value)


class Special(nn.Linear):
    pass


REFUSED = {
    "another eps": ("encoder.layer.1.output.LayerNorm.eps", 1e-5, "encoder.layer.1.output.LayerNorm.eps is 1e-05"),
    "relative positions (4.x)": (
        "embeddings.position_embedding_type",
        "relative_key",
        "embeddings.position_embedding_type is 'relative_key'; only 'absolute'",
    ),
    "relative positions in a layer (4.x)": (
        "encoder.layer.1.attention.self.position_embedding_type",
        "relative_key_query",
        "encoder.layer.1.attention.self.position_embedding_type is 'relative_key_query'",
    ),
    "causal": ("encoder.layer.0.attention.self.is_causal", True, "attention.self.is_causal is True"),
    "decoder layer": ("encoder.layer.0.is_decoder", True, "encoder.layer.0.is_decoder is True"),
    "pruned heads (4.x)": ("encoder.layer.0.attention.self.num_attention_heads", 1, "1 heads of 32"),
    "another scale": ("encoder.layer.1.attention.self.scaling", 1.0, "encoder.layer.1 has scale 1.0"),
    "a subclass": ("encoder.layer.0.output.dense", Special(96, 64), "Special, not torch.nn.modules.linear.Linear"),
    "no bias": ("encoder.layer.0.output.dense", nn.Linear(96, 64, bias=False), "output.dense.bias is not a parameter"),
    "another size": ("encoder.layer.0.output.dense", nn.Linear(97, 64), "dense.weight has shape [64, 97]"),
    "another norm": ("embeddings.LayerNorm", nn.Identity(), "embeddings.LayerNorm is torch.nn.modules.linear.Identity"),
    "a norm without weights": (
        "embeddings.LayerNorm",
        nn.LayerNorm(64, elementwise_affine=False),
        "embeddings.LayerNorm.weight is not a parameter",
    ),
    "renormed embeddings": ("embeddings.word_embeddings.max_norm", 1.0, "word_embeddings.max_norm is 1.0"),
    "another dropout": ("embeddings.dropout", nn.AlphaDropout(), "embeddings.dropout is"),
    "another pooler": ("pooler.activation", nn.ReLU(), "pooler.activation is"),
    "another layer": ("encoder.layer.1", nn.Identity(), "encoder.layer.1 is"),
    "no layers": ("encoder.layer", nn.ModuleList(), "encoder.layer is empty"),
    "an adapter in a layer": ("encoder.layer.0.attention.output", nn.Identity(), "encoder.layer.0.attention.output is"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("head", ["base", "sequence"])
def test_refused_by_name(case, head):
    path, value, text = REFUSED[case]
    model = make(head)
    set_at(model, path if head == "base" else f"bert.{path}", value)
    assert text in refusal(model)


@pytest.mark.parametrize("fields", [{"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}])
def test_decoders_are_refused(fields):
    assert "config.is_decoder is True" in refusal(make(**fields))


def test_a_layer_of_another_size_is_refused():
    model = make()
    model.encoder.layer[1] = make(intermediate_size=80).encoder.layer[0]
    assert "encoder.layer.1 has intermediate_size 80 but layer 0 has 96" in refusal(model)


def test_another_classifier_is_refused():
    model = make("token")
    model.classifier = nn.Sequential(nn.Linear(64, 2))
    assert "classifier is torch.nn.modules.container.Sequential" in refusal(model)


def test_a_missing_pooler_is_refused():
    model = make("sequence")
    model.bert.pooler = None
    assert "bert.pooler is builtins.NoneType" in refusal(model)


def test_chunked_feed_forward_is_the_same_arithmetic():
    assert models.match(make(chunk_size_feed_forward=4)).encoder == EncoderSpec(**SPEC)


def test_older_releases_without_a_scaling_attribute():
    model = make()
    for layer in model.encoder.layer:
        vars(layer.attention.self).pop("scaling", None)
        layer.attention.self.position_embedding_type = "absolute"
    assert models.match(model).encoder == EncoderSpec(**SPEC)


def test_older_releases_with_an_sdpa_class():
    model = make()
    cls = type(first_layer(model).attention.self)
    for layer in model.encoder.layer:
        layer.attention.self.__class__ = type("BertSdpaSelfAttention", (cls,), {"__module__": cls.__module__})
    assert models.match(model).encoder == EncoderSpec(**SPEC)


def test_older_releases_leave_a_bound_forward():
    model = make()
    first_layer(model).forward = first_layer(model).forward
    assert models.match(model) is not None


@pytest.mark.parametrize(
    "module",
    [nn.Linear(2, 2), BertLMHeadModel(BertConfig(num_hidden_layers=1, hidden_size=12)), nn.Sequential(make())],
    ids=["linear", "causal-lm", "outer"],
)
def test_other_classes_are_not_ours(module):
    assert models.match(module) is None


def test_constants_are_live():
    match = models.match(make(num_hidden_layers=3))
    names = sorted(name for _, name in match.constants)
    assert names.count("eps") == 7 and names.count("num_attention_heads") == 3
    assert names.count("scaling") == (0 if FOUR and not hasattr(first_layer(make()).attention.self, "scaling") else 3)
    assert all(name in module.__dict__ for module, name in match.constants)


def test_outputs_are_of_the_stock_class():
    hidden, ids = torch.ones(2, 3, 64), torch.ones(2, 3, dtype=torch.long)
    for head in HEAD_SPECS:
        model = make(head)
        match = models.match(model)
        branches = tuple(
            torch.ones((2,) if branch.rows == "first_token" else (2, 3)).unsqueeze(-1).repeat_interleave(
                branch.out_features, -1
            )
            for branch in match.head.branches
        )
        request = Request(ids, None, None, num_choices=2)
        ours = match.build_output(EncoderOutput(hidden if match.head.hidden_states else None, branches), request)
        with torch.no_grad():
            stock = model(input_ids=ids[None] if match.head.choices else ids)
        assert type(ours) is type(stock) and ours.keys() == stock.keys()
        assert [v.shape for v in ours.values()] == [v.shape for v in stock.values()]
        assert all(v.is_contiguous() for v in ours.values())
        for name in stock:
            assert (name in match.per_token) == (stock[name].shape[:2] == ids.shape)


def test_nothing_of_transformers_is_imported_early():
    code = "import sys, clinfast.patch; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_config_is_enough_for_any_size():
    config = BertConfig(
        vocab_size=11, hidden_size=30, num_attention_heads=5, num_hidden_layers=1, intermediate_size=7,
        max_position_embeddings=9, type_vocab_size=1, layer_norm_eps=1e-6, num_labels=4,
    )  # fmt: skip
    spec = models.match(BertForSequenceClassification(config)).encoder
    assert (spec.head_dim, spec.eps, spec.type_vocab_size, spec.max_positions) == (6, 1e-6, 1, 9)
    assert spec == models.match(BertModel(config)).encoder
