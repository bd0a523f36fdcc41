"""Small BERT models with every parameter random, padded batches, and the error budget against float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

import clinfast
from clinfast.engine.spec import EncoderOutput

VOCAB = 97
HEADS = {
    "base": BertModel,
    "no-pooler": lambda config: BertModel(config, add_pooling_layer=False),
    "sequence": BertForSequenceClassification,
    "token": BertForTokenClassification,
    "qa": BertForQuestionAnswering,
    "mlm": BertForMaskedLM,
    "nsp": BertForNextSentencePrediction,
    "pretraining": BertForPreTraining,
}
CHOICE = {"choice": BertForMultipleChoice}  # its inputs are [B, C, S]
FIRST_TOKEN_READERS = ("base", "sequence", "nsp", "pretraining")


def make(head: str = "base", *, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> Any:
    """An eval-mode model. transformers starts with zero biases and unit LayerNorms, which would hide mistakes."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
    }
    model = (HEADS | CHOICE)[head](BertConfig(**{**settings, **fields}))
    randomize(model)
    return model.to(dtype).eval()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, 1.5 * module.in_features**-0.5)
            if module.bias is not None:
                module.bias.normal_(0, 0.3)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, 0.7)
        elif isinstance(module, nn.LayerNorm):
            module.weight.normal_(1, 0.3)
            if module.bias is not None:
                module.bias.normal_(0, 0.3)


def ids(batch: int, seqlen: int, *, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


def right_padded(lengths: list[int], seqlen: int | None = None, dtype: torch.dtype = torch.int64) -> Tensor:
    """A [B, S] mask with `lengths[b]` ones at the left of row b."""
    return (torch.arange(seqlen or max(lengths)) < torch.tensor(lengths)[:, None]).to(dtype)


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows at real tokens; all rows of an output that has one row a note."""
    if mask is None or x.dim() < 2 or x.shape[:2] != mask.shape:
        return x
    return x[mask.bool()]


@torch.no_grad()
def run(model: Any, **inputs: Any) -> dict[str, Tensor]:
    return {name: value for name, value in model(**inputs).items() if isinstance(value, Tensor)}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def mapped(output: EncoderOutput, change: Callable[[Tensor], Tensor]) -> EncoderOutput:
    """The encoder's output with `change` made to each of its tensors."""
    hidden = None if output.hidden_states is None else change(output.hidden_states)
    return EncoderOutput(hidden, tuple(map(change, output.branches)))


def worst_error(x: Tensor, exact: Tensor) -> float:
    assert x.shape == exact.shape, (x.shape, exact.shape)
    return (x.double() - exact).abs().max().item() if x.numel() else 0.0


class Subject:
    """A model to optimize, a stock copy of it, and one in float64.

    Args:
        model: taken before `optimize`.
        stock_dtype: what stock computes in, where that is not the model's own dtype.
        options: of `optimize`.
    """

    def __init__(self, model: Any, *, stock_dtype: torch.dtype | None = None, **options: Any) -> None:
        self.stock = copy.deepcopy(model).to(stock_dtype or model.dtype)
        self.exact = copy.deepcopy(model).double()
        self.model = clinfast.optimize(model, **options)
        self._stock_errors: dict[str, float] | None = None

    @property
    def stock_errors(self) -> dict[str, float]:
        """Stock's largest error by output over 128 notes: what it is on a few rows is a matter of luck."""
        if self._stock_errors is None:
            self._stock_errors = self._errors_of_stock(128)
        return self._stock_errors

    def _errors_of_stock(self, notes: int) -> dict[str, float]:
        config = self.model.config
        # Four short of the table: RoBERTa counts its positions from the pad id on.
        batch = ids(notes, max(1, min(config.max_position_embeddings - 4, 24)), vocab=config.vocab_size, seed=9)
        if type(self.model).__name__.endswith("MultipleChoice"):
            batch = batch.view(notes // 2, 2, -1)
        stock, exact = run(self.stock, input_ids=batch), run(self.exact, input_ids=batch)
        return {name: worst_error(stock[name], exact[name]) for name in exact}

    def counts(self) -> tuple[int, int]:
        report = clinfast.report(self.model)
        return report.calls_fast, report.calls_stock

    @contextlib.contextmanager
    def one_call(self, kind: str) -> Iterator[None]:
        """The calls inside are one, and it is `"fast"` or `"stock"`."""
        fast, stock = self.counts()
        yield
        expected = (fast + 1, stock) if kind == "fast" else (fast, stock + 1)
        assert self.counts() == expected, clinfast.report(self.model).fallbacks

    def check(self, *, all_positions: bool = False, **inputs: Any) -> dict[str, Tensor]:
        """One fast call within the error budget; returns what it gave."""
        with self.one_call("fast"):
            ours = run(self.model, **inputs)
        stock, exact = run(self.stock, **inputs), run(self.exact, **inputs)
        assert ours.keys() == exact.keys()
        mask = None if all_positions else inputs.get("attention_mask")
        for name, value in ours.items():
            assert value.dtype is self.model.dtype and value.isfinite().all()
            mine, theirs, truth = (real_rows(outputs[name], mask) for outputs in (ours, stock, exact))
            budget = 2 * max(worst_error(theirs, truth), self.stock_errors[name])
            budget += torch.finfo(self.model.dtype).eps * (truth.abs().max().item() if truth.numel() else 0.0)
            error = worst_error(mine, truth)
            if error > budget:  # one note in some hundreds multiplies every rounding error by ten
                budget = max(budget, 2 * self._errors_of_stock(1024)[name])
            assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"
        return ours

    def check_stock(self, **inputs: Any) -> dict[str, Tensor]:
        """One call that goes to the stock forward, and gives what the stock copy gives to the bit."""
        with self.one_call("stock"):
            ours = run(self.model, **inputs)
        assert_equal(ours, run(self.stock, **inputs))
        return ours
