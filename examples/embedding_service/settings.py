"""What the service can be told, by environment variables."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import Problem


@dataclasses.dataclass(frozen=True)
class Settings:
    """Each field is set by `EMBEDDING_` and its name in capitals."""

    model: Path = dataclasses.field(metadata={"help": "folder of a sentence-transformers model"})
    precision: str = dataclasses.field(default="auto", metadata={"help": "what clinfast computes in: auto, fp32, bf16"})
    threads: int = dataclasses.field(default=0, metadata={"help": "threads to compute with; 0 is torch's choice"})
    window_ms: int = dataclasses.field(default=5, metadata={"help": "how long a request waits for others, ms"})
    token_budget: int = dataclasses.field(default=4096, metadata={"help": "most tokens computed at once"})
    queue_tokens: int = dataclasses.field(default=65536, metadata={"help": "most tokens that wait; beyond it 503"})
    max_texts: int = dataclasses.field(default=64, metadata={"help": "most texts of a request; beyond it 413"})
    max_bytes: int = dataclasses.field(default=4 << 20, metadata={"help": "most bytes of a request; beyond it 413"})
    drain_seconds: int = dataclasses.field(default=30, metadata={"help": "time for waiting requests at shutdown"})

    def __post_init__(self) -> None:
        if not (self.model / "config.json").is_file():
            raise Problem(f"EMBEDDING_MODEL={self.model} is not the folder of a model: it holds no config.json")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise Problem(f"EMBEDDING_PRECISION={self.precision} is unknown; choose auto, fp32 or bf16")
        for name in ("token_budget", "queue_tokens", "max_texts", "max_bytes"):
            if getattr(self, name) < 1:
                raise Problem(f"{variable(name)}={getattr(self, name)} must be at least 1")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Raises `Problem` where a variable is missing or wrong."""
        given = os.environ if environment is None else environment
        if not given.get(variable("model")):
            raise Problem("EMBEDDING_MODEL is not set; it names the folder of a sentence-transformers model")
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            text = given.get(variable(field.name))
            if not text:
                continue
            if isinstance(field.default, int) and not text.isdecimal():
                raise Problem(f"{variable(field.name)}={text} is not a whole number")
            values[field.name] = int(text) if isinstance(field.default, int) else text
        return cls(**values | {"model": Path(values["model"])})


def variable(name: str) -> str:
    return f"EMBEDDING_{name.upper()}"
