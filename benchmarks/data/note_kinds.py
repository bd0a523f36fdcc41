"""The kinds of note: which sections each has, and which kind suits which length."""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple


class Section(NamedTuple):
    """One section: `least` frames are taken at urgency `need` (0: whatever the length), others at `want`."""

    heading: str | None
    fields: tuple[str, ...]
    least: int = 1
    need: float = 0.0
    want: float = 2.0
    ordered: bool = False
    listed: bool = False
    joined_by: str = ""
    prose_join: str = " "
    one_of: bool = False
    normal_only: bool = False
    always_headed: bool = False


def labs(need: float, **more) -> Section:
    return Section("lab", ("lab.*",), 3, need, 1.8, joined_by=", ", always_headed=True, **more)


def meds(heading: str, fields: tuple[str, ...], need: float) -> Section:
    return Section(heading, fields, 9, need, 1.2, listed=True, prose_join="; ", always_headed=True)


PMH = Section("pmh", ("pmhline",), 1, 0.6, one_of=True, always_headed=True)
ALLERGY = Section("allergy", ("allergy",), 1, 0.8, one_of=True, always_headed=True)

KINDS: dict[str, tuple[Section, ...]] = {
    "progress": (
        Section("subj", ("subj",), 1, 0.0, 1.2),
        Section("vitals", ("vitals2",), 1, 0.1, one_of=True, always_headed=True),
        Section("exam", ("exam.*",), 1, 0.2, 1.6),
        Section("lab", ("trend",), 1, 0.3, one_of=True),
        Section(None, ("lab.*",), 3, 3.4, 4.0, joined_by=", ", normal_only=True),
        Section("imaging", ("imaging",), 1, 2.0, one_of=True),
        Section("assess", ("assess",), 1, 0.0, one_of=True),
        Section("plan", ("plan",), 1, 0.0, 0.9, listed=True),
    ),
    "clinic": (
        Section("hpi", ("hpi",), 1, 0.3, 1.4, ordered=True),
        Section("subj", ("subj",), 1, 0.2, 1.2),
        meds("meds", ("homemeds",), 1.0),
        Section("vitals", ("vitalsc",), 1, 0.4, one_of=True, always_headed=True),
        Section("exam", ("exam.*",), 1, 0.3, 1.8),
        Section("lab", ("trend",), 1, 0.6, one_of=True),
        Section("assess", ("assessc",), 1, 0.0, one_of=True),
        Section("plan", ("ownplan", "planc"), 1, 0.0, 0.9, listed=True),
        Section("advice", ("owninstr",), 1, 2.2, 2.6),
    ),
    "discharge": (
        Section("dx", ("dxline",), 1, 0.0, one_of=True),
        Section("hpi", ("opening",), 1, 0.0, one_of=True),
        Section(None, ("hpi",), 1, 0.5, 1.6, ordered=True),
        Section("course", ("course",), 1, 0.0, 0.8, ordered=True),
        Section("imaging", ("imaging",), 1, 1.8, one_of=True),
        Section("lab", ("trend",), 1, 1.0, one_of=True),
        Section("exam", ("vitals2", "exam.*"), 1, 1.5, 2.6),
        Section(
            "dmeds", ("dmeds", "homemeds"), 9, 0.1, 1.0, listed=True, prose_join="; ", always_headed=True
        ),
        Section("status", ("status",), 1, 0.7, one_of=True),
        Section("instr", ("instr",), 1, 0.6, 1.8, listed=True),
        Section("follow", ("follow",), 1, 0.4, 1.6),
    ),
    "consult": (
        Section("hpi", ("opening",), 1, 0.0, one_of=True),
        Section(None, ("hpi",), 1, 0.0, 0.8, ordered=True),
        meds("meds", ("homemeds",), 0.6),
        ALLERGY,
        Section("social", ("social",), 1, 1.2, 2.2),
        Section("family", ("family",), 1, 2.0, one_of=True),
        Section("ros", ("ros.*",), 1, 1.4, 2.4, joined_by="; "),
        Section("vitals", ("vitals",), 1, 0.1, one_of=True, always_headed=True),
        Section("exam", ("exam.*",), 2, 0.2, 1.6),
        labs(0.3),
        Section("imaging", ("imaging",), 1, 0.9, one_of=True),
        Section("assess", ("assess0",), 1, 0.0, one_of=True),
        Section("plan", ("plan",), 2, 0.2, 0.9, listed=True),
    ),
    "triage": (
        Section("cc", ("ccline",), 1, 0.0, one_of=True),
        Section("hpi", ("hpi",), 1, 2.0, 3.0, ordered=True),
        Section("vitals", ("vitals",), 1, 0.1, one_of=True),
        PMH,
        meds("meds", ("homemeds",), 2.2),
        ALLERGY,
        Section(None, ("triage",), 1, 0.3, 0.9, ordered=True),
    ),
    "nursing": (
        Section("nursing", ("nursing",), 1, 0.0, 1.0),
        Section("vitals", ("vitals2",), 1, 0.4, one_of=True),
    ),
    "telephone": (
        Section("tel", ("telopen", "tel"), 2, 0.0, 1.0, ordered=True),
        Section(None, ("owninstr",), 1, 0.8, 2.0),
        Section("plan", ("planc",), 1, 1.5, 2.5),
    ),
    "therapy": (
        Section("rehab", ("rehab",), 2, 0.0, 1.0, ordered=True),
        Section("vitals", ("vitalsc",), 1, 1.2, one_of=True),
    ),
    "radiology": (
        Section("study", ("studytitle",), 1, 0.0, one_of=True, always_headed=True),
        Section("indication", ("indicationline",), 1, 0.3, one_of=True),
        Section("technique", ("technique.$study",), 1, 0.9, one_of=True),
        Section("comparison", ("comparison",), 1, 1.0, one_of=True),
        Section("find", ("find", "normal.$study"), 1, 0.0, 0.9, ordered=True),
        Section("imp", ("imp",), 1, 0.1, one_of=True, always_headed=True),
    ),
    "procedure": (
        Section("preop", ("dxname",), 1, 0.1, one_of=True, always_headed=True),
        Section("postop", ("same",), 1, 0.8, one_of=True, always_headed=True),
        Section("indication", ("opening",), 1, 1.6, one_of=True),
        Section("proc", ("procpre", "proc", "procpost"), 3, 0.0, 0.9, ordered=True),
        Section("plan", ("plan",), 1, 1.2, 1.9, listed=True),
        Section("comment", ("follow",), 1, 2.0, 2.6),
    ),
    "pathology": (
        Section("specimen", ("specimen",), 1, 0.0, one_of=True, always_headed=True),
        Section("indication", ("indication",), 1, 0.5, one_of=True),
        Section("gross", ("gross",), 1, 0.3, one_of=True),
        Section("micro", ("micro",), 1, 0.2, 0.6, ordered=True),
        Section("pathdx", ("pathdx",), 1, 0.0, one_of=True, always_headed=True),
        Section("comment", ("comment",), 1, 0.8, one_of=True),
    ),
    "medication": (
        Section(None, ("text",), 2, 0.0, 0.5, ordered=True),
        meds("meds", ("homemeds",), 0.9),
        ALLERGY,
        Section("plan", ("planc",), 1, 1.2, 2.0, listed=True),
    ),
    "oneliner": (Section(None, ("oneliner",), 1, 0.0, one_of=True),),
}

# Upper bound of the length in tokens, then the weight of each kind below it.
BY_LENGTH: tuple[tuple[int, dict[str, int]], ...] = (
    (24, {"oneliner": 1}),
    (46, {"nursing": 4, "triage": 3, "telephone": 2, "radiology": 1}),
    (
        100,
        {
            "nursing": 4,
            "triage": 4,
            "progress": 3,
            "telephone": 2,
            "radiology": 2,
            "medication": 2,
            "pathology": 2,
        },
    ),
    (
        150,
        {
            "progress": 5,
            "radiology": 3,
            "clinic": 3,
            "pathology": 2,
            "medication": 2,
            "triage": 2,
            "nursing": 2,
            "therapy": 2,
            "telephone": 1,
            "procedure": 1,
            "discharge": 1,
        },
    ),
    (
        230,
        {
            "progress": 4,
            "clinic": 4,
            "discharge": 3,
            "radiology": 2,
            "procedure": 2,
            "consult": 2,
            "therapy": 1,
        },
    ),
    (360, {"progress": 3, "consult": 4, "discharge": 4, "clinic": 3}),
    (10_000, {"consult": 5, "discharge": 4}),
)


def kind_for_length(length: int, language: str, so_far: Counter, rng: random.Random) -> str:
    """A kind whose notes are about this long, preferring those written least in this language."""
    weights = next(weights for bound, weights in BY_LENGTH if length <= bound)
    return min(
        weights, key=lambda kind: (1 + so_far[language, kind]) / weights[kind] * (0.7 + 0.6 * rng.random())
    )
