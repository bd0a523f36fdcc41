"""Why a call runs the stock forward, and how the user is told."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

AGAIN = "call clinfast.restore(model), then clinfast.optimize(model)"
LIBRARIES = ("clinfast", "torch", "transformers", "sentence_transformers", "accelerate", "contextlib")


class ClinfastWarning(UserWarning):
    """A call took the stock forward, or a part of the model stays stock; given once a reason and model."""


class StrictError(RuntimeError):
    """`strict=True`, and the stock forward would have to run; the message says why."""


class Reason(str):
    """A short plain phrase without values, so that counting by it stays bounded.

    Attributes:
        advice: what to do to get the fast path back.
        mistake: for input that stock is likely to refuse, a sentence with the offending value; it goes into
            stock's own error.
        dirties: weights may change without a trace after such a call, so they are packed anew.
        quiet: asked for, hence neither warned about nor refused under `strict`.
    """

    __slots__ = ("advice", "dirties", "mistake", "quiet")

    advice: str
    mistake: str | None
    dirties: bool
    quiet: bool

    def __new__(
        cls,
        phrase: str,
        advice: str = "",
        *,
        mistake: str | None = None,
        dirties: bool = False,
        quiet: bool = False,
    ) -> Reason:
        self = super().__new__(cls, phrase)
        self.advice, self.mistake, self.dirties, self.quiet = advice, mistake, dirties, quiet
        return self

    def sentence(self, model: object) -> str:
        advice = f": {self.advice}" if self.advice else ""
        return f"{type(model).__name__} runs its stock forward, because {self}{advice}"


def warn(message: str) -> None:
    """Warn at the user's line, past the libraries in between; who calls sees to it that it is said once."""
    frame: FrameType = sys._getframe(1)
    while frame.f_back is not None and _package(frame) in LIBRARIES:
        frame = frame.f_back
    # Without a registry Python's own once-a-line rule, which cannot tell two models apart, stays out of it.
    warnings.warn_explicit(
        message, ClinfastWarning, frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__")
    )


def _package(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0]
