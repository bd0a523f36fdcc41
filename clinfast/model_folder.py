"""A saved Hugging Face model on this disk. Nothing here goes online, or runs code that lies in the folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
)
# These count positions from the padding id on, so that the table has that many rows more than a note may have tokens.
POSITIONS_AFTER_PAD = (
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet",
)  # fmt: skip
TWO_TOKEN_TYPES = ("bert", "albert", "ernie", "megatron-bert")  # where the config names no number of them
# transformers 5 has no limit where a tokenizer names none, and says so with a very large number.
NO_LIMIT = 10**6


class BadInput(Exception):
    """Something that the user can put right; the message is one sentence."""


def first_line(error: BaseException) -> str:
    """What an exception of a library says, short enough for a line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 300 else text[:297] + "..."


@dataclass(frozen=True)
class ModelFolder:
    """`name` is what tables call it."""

    name: str
    folder: Path

    @classmethod
    def at(cls, folder: Path) -> Self:
        """The model in `folder`, its config read.

        Raises:
            BadInput: there is no such folder, or no readable config.json in it.
        """
        if not folder.is_dir():
            kind = "is a file" if folder.exists() else "does not exist"
            raise BadInput(f"model folder {folder} {kind}; give a folder that save_pretrained() wrote")
        found = cls(folder.resolve().name, folder)
        found.config  # noqa: B018
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        file = self.folder / "config.json"
        if not file.is_file():
            raise BadInput(f"{self.folder} holds no config.json, so it is not the folder of a model")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadInput(f"{file} cannot be read: {first_line(error)}") from error
        if not isinstance(config, dict):
            raise BadInput(f"{file} is not a JSON object")
        return config

    def _number(self, *names: str, default: int = 0) -> int:
        """The first of these fields that the config has; families disagree on their names."""
        values = (self.config.get(name) for name in names)
        return int(next((value for value in values if value is not None), default))

    @property
    def vocab_size(self) -> int:
        return self._number("vocab_size")

    @property
    def hidden_size(self) -> int:
        return self._number("hidden_size", "dim", "d_model")

    @property
    def intermediate_size(self) -> int:
        return self._number("intermediate_size", "hidden_dim")

    @property
    def layers(self) -> int:
        return self._number("num_hidden_layers", "n_layers")

    @property
    def heads(self) -> int:
        return self._number("num_attention_heads", "n_heads")

    @property
    def pad_id(self) -> int:
        return self._number("pad_token_id")

    @property
    def longest(self) -> int:
        """Tokens that a note may have, special ones included."""
        positions = self._number("max_position_embeddings", default=512)
        offset = self.pad_id + 1 if self.config.get("model_type") in POSITIONS_AFTER_PAD else 0
        limit = self._tokenizer_config.get("model_max_length")
        named = int(limit) if isinstance(limit, (int, float)) and 0 < limit < NO_LIMIT else positions
        return min(positions - offset, named)

    @cached_property
    def _tokenizer_config(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def inputs(self) -> tuple[str, ...]:
        """The arguments that its forward takes."""
        types = self._number("type_vocab_size", default=2 if self.config.get("model_type") in TWO_TOKEN_TYPES else 0)
        return ("input_ids", "attention_mask", "token_type_ids") if types else ("input_ids", "attention_mask")

    @property
    def precision(self) -> str | None:
        """What its weights are stored in; None where the config does not say."""
        return DTYPES.get(str(self.config.get("dtype") or self.config.get("torch_dtype")).removeprefix("torch."))

    @property
    def architecture(self) -> str:
        """The class name in its config."""
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise BadInput(
                f"{self.folder}/config.json names no architecture; add for example \"architectures\": "
                '["BertForTokenClassification"]'
            )
        return names[0]

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)

    def model_class(self) -> Any:
        """The transformers class of that name.

        Raises:
            BadInput: transformers has none, or it takes several choices a note.
        """
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import transformers

        name = self.architecture
        if name.endswith("ForMultipleChoice"):
            raise BadInput(f"{name} takes several choices a note, and plain texts have none")
        found = getattr(transformers, name, None)
        if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
            where = " (the folder brings code of its own, which is never run)" if "auto_map" in self.config else ""
            raise BadInput(f"architecture {name} is unknown to transformers {transformers.__version__}{where}")
        return found

    def load_model(self, dtype: torch.dtype | None = None, **options: Any) -> Any:
        """The stock model in eval mode.

        Args:
            dtype: of its weights; None keeps what they are stored in.
            options: further ones of `from_pretrained`.

        Raises:
            BadInput: see `model_class`; or the weights cannot be read, or lack a part of that class.
        """
        import torch

        cls = self.model_class()
        quiet_transformers()
        torch.manual_seed(0)  # a pooler that the file lacks is random, and is to be so alike everywhere
        name = "dtype" if _takes_dtype() else "torch_dtype"
        try:
            model, info = cls.from_pretrained(
                self.folder,
                local_files_only=True,
                output_loading_info=True,
                **{name: "auto" if dtype is None else dtype},
                **options,
            )
        except Exception as error:
            raise BadInput(f"the weights in {self.folder} cannot be read: {first_line(error)}") from error
        # Many published encoders come without a pooler, which their users do not read.
        named = {name for name, _ in model.named_parameters() if "pooler." not in name}
        if lacking := sorted(named & set(info["missing_keys"])):
            others = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise BadInput(
                f"the weights in {self.folder} lack {lacking[0]}{others}, so a {self.architecture} would run on "
                "random numbers"
            )
        return model.eval()

    def load_tokenizer(self) -> Any:
        """
        Raises:
            BadInput: there is none, it cannot be read, or it cannot pad.
        """
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import transformers

        if not self.has_tokenizer:
            raise BadInput(
                f"{self.folder} holds no tokenizer (tokenizer.json, vocab.txt, ...); save the model's there with "
                "tokenizer.save_pretrained()"
            )
        quiet_transformers()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:
            raise BadInput(f"the tokenizer in {self.folder} cannot be read: {first_line(error)}") from error
        if tokenizer.pad_token_id is None:
            raise BadInput(f"the tokenizer in {self.folder} has no padding token, so it is not an encoder's")
        tokenizer.padding_side = "right"
        return tokenizer


def quiet_transformers() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _takes_dtype() -> bool:
    """transformers 4.56 renamed `torch_dtype`."""
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return (major, minor) >= (4, 56)
