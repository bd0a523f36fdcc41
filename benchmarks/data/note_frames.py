"""Sentence frames for synthetic clinical notes: reading them, and filling them in for one case.

A frames file is plain text: `== problem` opens a problem (or `common`), every other line is `field: frame`.
Inside a frame:

    [dm2,!ckd] at the start   only for cases that carry these tags
    {a|b|}                    one of the alternatives; an alternative may open with tags
    {@key a|b}                the same position everywhere in the note, so that facts agree
    #3-6# #days=3-6# #3-9/3#  a number as precise as its lower bound, in steps; named ones are drawn once
    $name                     a value of the case
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SPLIT_ON_BARS = ("heading.", "title.", "cond.", "name")
TAGS = re.compile(r"^\[([!\w,]+)\] ?")
CHOICE = re.compile(r"\{([^{}]*)\}")
NUMBER = re.compile(r"#(?:(\w+)=)?(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)(?:/(\d+))?#")
VARIABLE = re.compile(r"\$([A-Za-z]+[01]?)")
# "$ladas" is the plural of $lada, "$o" may be followed by more letters: longest known name wins.


class Frame(NamedTuple):
    problem: str
    field: str
    text: str


@dataclass
class Frames:
    """All frames of one language, and how often each has been used so far."""

    table: dict[str, dict[str, list[Frame]]]
    used: Counter = field(default_factory=Counter)

    @classmethod
    def read(cls, path: Path) -> Frames:
        table: dict[str, dict[str, list[Frame]]] = {}
        problem = ""
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = line.strip()
            if not line:
                continue
            if line.startswith("== "):
                problem = line[3:]
                table[problem] = {}
                continue
            name, separator, text = line.partition(": ")
            if not separator:
                raise ValueError(f"{path.name}:{number}: expected 'field: frame', got {line!r}")
            texts = text.split(" | ") if name.startswith(SPLIT_ON_BARS) else [text]
            table[problem].setdefault(name, []).extend(Frame(problem, name, t.strip()) for t in texts)
        return cls(table)

    def of(self, problem: str, name: str) -> list[Frame]:
        return self.table.get(problem, {}).get(name, [])

    def keys(self, problem: str, prefix: str) -> list[str]:
        return [name for name in self.table.get(problem, {}) if name.startswith(prefix + ".")]


@dataclass
class Case:
    """One invented patient at one moment: the values, tags and choices that a note must agree on."""

    rng: random.Random
    tags: set[str]
    values: dict[str, str]
    numbers: dict[str, str] = field(default_factory=dict)
    choices: dict[str, float] = field(default_factory=dict)

    def allows(self, tags: str) -> bool:
        return all(
            (t[1:] not in self.tags) if t.startswith("!") else (t in self.tags) for t in tags.split(",")
        )

    def admits(self, text: str) -> bool:
        found = TAGS.match(text)
        return found is None or self.allows(found[1])

    def fill(self, text: str) -> str:
        """The frame with every choice, number and variable settled."""
        text = TAGS.sub("", text, count=1)
        while CHOICE.search(text):
            text = CHOICE.sub(self._choose, text, count=1)
        text = NUMBER.sub(self._draw, text)
        return re.sub(r"  +", " ", VARIABLE.sub(self._value, text)).strip()

    def _choose(self, found: re.Match[str]) -> str:
        body = found[1]
        key = None
        if body.startswith("@"):
            key, _, body = body[1:].partition(" ")
        options = [option for option in body.split("|") if self.admits(option)]
        if not options:
            return ""
        if key is None:
            chosen = self.rng.choice(options)
        else:
            share = self.choices.setdefault(key, self.rng.random())
            chosen = options[int(share * len(options))]
        tags = TAGS.match(chosen)
        return chosen[tags.end(1) + 1 :] if tags else chosen

    def _draw(self, found: re.Match[str]) -> str:
        name, low, high, step = found.groups()
        if name in self.numbers:
            return self.numbers[name]
        places = len(low.partition(".")[2])
        scale = 10**places
        value = self.rng.randrange(round(float(low) * scale), round(float(high) * scale) + 1, int(step or 1))
        text = f"{value / scale:.{places}f}"
        if name:
            self.numbers[name] = text
        return text

    def _value(self, found: re.Match[str]) -> str:
        name = found[1]
        for end in range(len(name), 0, -1):
            if name[:end] in self.values:
                value = self.values[name[:end]]
                return (self.fill(value) if "{" in value or "$" in value else value) + name[end:]
        raise KeyError(f"${name} is not a value of the case; it has {sorted(self.values)}")


def typo(text: str, rng: random.Random, count: int) -> str:
    """Slips of the keyboard in `count` longer words: two letters swapped, one dropped, or one doubled."""
    spots = [m for m in re.finditer(r"\b[a-záéíóúñ]{6,}\b", text)]
    for spot in sorted(rng.sample(spots, min(count, len(spots))), key=lambda m: -m.start()):
        word = spot[0]
        at = rng.randrange(1, len(word) - 2)
        slip = rng.choice(("swap", "drop", "double"))
        if slip == "swap":
            word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        elif slip == "drop":
            word = word[:at] + word[at + 1 :]
        else:
            word = word[:at] + word[at] + word[at:]
        text = text[: spot.start()] + word + text[spot.end() :]
    return text
