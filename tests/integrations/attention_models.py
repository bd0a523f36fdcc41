"""Small random models on transformers' attention interface, and what stock makes of them."""

import contextlib
import copy

import torch
import transformers

from clinfast.integrations import attention_interface
from clinfast.ops import registry

VOCAB, LAYERS = 61, 2
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
}
# In each: the model class, its config, and the names of the config's fields where they are not the common ones.
FAMILIES = {
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {}),
    "xlm_roberta": ("XLMRoberta", {}),
    "camembert": ("Camembert", {}),
    "electra": ("Electra", {"embedding_size": 24}),
    "albert": ("Albert", {"embedding_size": 24}),
    "distilbert": ("DistilBert", {"dim": 32, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 48}),
    "esm": ("Esm", {"pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"}),
    "layoutlm": ("LayoutLM", {}),
    "nomic_bert": ("NomicBert", {}),
    "eurobert": ("EuroBert", {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 4}),
    "modernbert": (
        "ModernBert",
        {"local_attention": 60, "global_attn_every_n_layers": 2, "pad_token_id": 1, "bos_token_id": 2}
        | {"eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    ),
}
FAMILIES = {family: entry for family, entry in FAMILIES.items() if hasattr(transformers, entry[0] + "Config")}


@torch.no_grad()
def randomize(model):
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.7 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.3)


def config_of(family, **fields):
    name, own = FAMILIES[family]
    return getattr(transformers, name + "Config")(**{**COMMON, **own, **fields})


def make(family, dtype=torch.float32, seed=0, **fields):
    torch.manual_seed(seed)
    model = getattr(transformers, FAMILIES[family][0] + "Model")(config_of(family, **fields)).eval()
    randomize(model)
    return model.to(dtype)


def ids(batch, seqlen, seed=0):
    return torch.randint(5, VOCAB, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


def masks(seqlen):
    column = torch.arange(seqlen)
    lengths = torch.tensor([seqlen, 3, 7, 1])[:, None]
    right = column < lengths
    holes = torch.rand(4, seqlen, generator=torch.Generator().manual_seed(1)) > 0.4
    holes[:, 1] = True
    empty = right.clone()
    empty[2] = False
    return {
        "none": None,
        "full": torch.ones(4, seqlen, dtype=torch.long),
        "right": right.long(),
        "right-bool": right,
        "left": right.flip(1).long(),
        "both-sides": ((column >= 2) & (column < 2 + lengths.clamp(max=seqlen - 3))).int(),
        "holes": holes.long(),
        "empty-row": empty.long(),
    }


@torch.no_grad()
def hidden(model, **inputs):
    return model(**inputs).last_hidden_state


class Stock:
    """Copies of a model: sdpa in its dtype, sdpa and eager in float64."""

    def __init__(self, model):
        self.sdpa, self.sdpa64, self.eager64 = (copy.deepcopy(model) for _ in range(3))
        self.sdpa.set_attn_implementation("sdpa")
        self.sdpa64.double().set_attn_implementation("sdpa")
        self.eager64.double().set_attn_implementation("eager")

    def exact(self, **inputs):
        """Eager in float64; sdpa where a query has no key, since eager then gives the mean of all values, or NaN."""
        mask, found = inputs.get("attention_mask"), hidden(self.eager64, **inputs)
        empty = found.isnan()
        if mask is not None:
            empty |= ~mask.bool().any(1)[:, None, None]
        return torch.where(empty, hidden(self.sdpa64, **inputs), found) if empty.any() else found


def assert_in_budget(ours, sdpa, exact):
    assert ours.shape == exact.shape and ours.isfinite().all()
    theirs = (sdpa.double() - exact).abs().max().item()
    floor = 4 * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    error = (ours.double() - exact).abs().max().item()
    assert error <= 2 * theirs + floor, f"error {error:.2e}, sdpa's {theirs:.2e}"


def spaced(reason):
    return reason if " " in reason else reason.replace("_", " ")


@contextlib.contextmanager
def counted(packed=0, **sdpa):
    """The attention calls inside: so many packed, and by reason (spaces or underscores) so many through sdpa."""
    before, kernel = +attention_interface.calls, registry.calls["attention[cpu]"]
    yield
    expected = {"packed": packed} | {f"sdpa: {spaced(reason)}": count for reason, count in sdpa.items()}
    found = {label: count for label, count in (attention_interface.calls - before).items() if count}
    assert found == {label: count for label, count in expected.items() if count}
    assert registry.calls["attention[cpu]"] - kernel == packed
