"""What each Hugging Face architecture computes, read off its live modules.

A family is one line in `FAMILIES` and one module with `CLASSES`: class name -> function(module) -> Match.
Both are keyed by strings, so nothing of transformers is imported before a model of that family is seen.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from torch import nn

from clinfast.engine.spec import Match, Unsupported
from clinfast.models import checks

FAMILIES = {
    "transformers.models.bert.modeling_bert": "clinfast.models.bert",
    "transformers.models.roberta.modeling_roberta": "clinfast.models.roberta",
    "transformers.models.xlm_roberta.modeling_xlm_roberta": "clinfast.models.roberta",
    "transformers.models.camembert.modeling_camembert": "clinfast.models.roberta",
    "transformers.models.electra.modeling_electra": "clinfast.models.electra",
    "transformers.models.distilbert.modeling_distilbert": "clinfast.models.distilbert",
    "transformers.models.albert.modeling_albert": "clinfast.models.albert",
    "transformers.models.ernie.modeling_ernie": "clinfast.models.ernie",
    "transformers.models.megatron_bert.modeling_megatron_bert": "clinfast.models.megatron_bert",
    "transformers.models.modernbert.modeling_modernbert": "clinfast.models.modernbert",
    "transformers.models.nomic_bert.modeling_nomic_bert": "clinfast.models.nomic_bert",
    "transformers.models.mpnet.modeling_mpnet": "clinfast.models.mpnet",
    "transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm": "clinfast.models.roberta",
    "transformers.models.deberta_v2.modeling_deberta_v2": "clinfast.models.deberta_v2",
    "transformers.models.xlm_roberta_xl.modeling_xlm_roberta_xl": "clinfast.models.roberta",
}


def match(module: nn.Module) -> Match | None:
    """What `module` computes, or None if its class is not one we know.

    Only the class itself counts: a subclass, or a class of that name from `trust_remote_code`, may compute
    anything.

    Raises:
        Unsupported: the class is known, but something in this instance is not proved to compute the same; the
            message names the submodule or field. Or the class is derived from a known one, or is a model of
            `trust_remote_code`; the message names it.
    """
    cls = type(module)
    recognise = _recogniser(cls)
    if recognise is None:
        _refuse_derived(cls)
        return None
    checks.plain_submodules(module)
    checks.plain_parameters(module)
    found: Match = recognise(module)
    return found


def _recogniser(cls: type) -> Callable[[nn.Module], Match] | None:
    adapter = FAMILIES.get(cls.__module__)
    if adapter is None or getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        return None
    found: Callable[[nn.Module], Match] | None = importlib.import_module(adapter).CLASSES.get(cls.__qualname__)
    return found


def _refuse_derived(cls: type) -> None:
    name = f"{cls.__module__}.{cls.__qualname__}"
    for base in cls.__mro__[1:]:
        if _recogniser(base) is not None:
            raise Unsupported(
                f"its class {name} is derived from {base.__qualname__} and may compute something else; only "
                "transformers' own classes are served"
            )
    is_model = any(base.__module__ == "transformers.modeling_utils" for base in cls.__mro__)
    if is_model and cls.__module__.startswith("transformers_modules."):
        raise Unsupported(
            f"its class {name} is code that came with the model (trust_remote_code) and may compute anything; only "
            "transformers' own classes are served"
        )
