"""Invented cases: who the patient is, what they have, and what goes with it clinically."""

from __future__ import annotations

import random

from note_frames import Case, Frame, Frames
from note_problems import (
    ACUTE,
    AGE_OF_ONSET,
    IN_THERAPY,
    LIKELIHOOD,
    ON_THE_PHONE,
    RARE_ABOVE_AGE,
    SPECIMENS,
    TOPICS,
    VISITS,
    Problem,
)


def problems_for(kind: str, frames: Frames) -> dict[str, Problem]:
    """The problems that a note of this kind can be about."""
    everything = {**ACUTE, **VISITS}
    if kind == "clinic":
        return VISITS
    if kind == "medication":
        return TOPICS
    if kind == "pathology":
        return SPECIMENS
    if kind == "therapy":
        return {name: everything[name] for name in IN_THERAPY}
    if kind == "telephone":
        return {**VISITS, **{name: ACUTE[name] for name in ON_THE_PHONE}}
    needed = {"procedure": "proc", "radiology": "study"}.get(kind)
    if needed:
        return {name: p for name, p in everything.items() if frames.of(name, needed)}
    return ACUTE


def comorbidities(problem: Problem, age: int, sex: str, rng: random.Random) -> list[str]:
    count = 1 + (age > 45) + (rng.random() < 0.5) + (age > 65 and rng.random() < 0.5)
    found = list(problem.always)
    possible = [c for c in LIKELIHOOD if age >= AGE_OF_ONSET[c] and age <= RARE_ABOVE_AGE.get(c, 120)]
    possible = [
        c for c in possible if c not in problem.never and c not in found and not (c == "bph" and sex == "f")
    ]
    while possible and len(found) < count + len(problem.always):
        chosen = rng.choices(possible, [LIKELIHOOD[c] for c in possible])[0]
        possible.remove(chosen)
        if not {"copd", "asthma"} <= {*found, chosen}:
            found.append(chosen)
    return found


def wording(language: str, age: int, sex: str, side: str) -> dict[str, str]:
    female, right = sex == "f", side == "right"
    other = "left" if right else "right"
    if language == "en":
        return {
            "sex": "F" if female else "M",
            "man": "woman" if female else "man",
            "gent": ("lady" if age > 60 else "woman") if female else ("gentleman" if age > 60 else "man"),
            "He": "She" if female else "He",
            "he": "she" if female else "he",
            "pt": "Pt",
            "side": side,
            "Side": side.capitalize(),
            "opp": other,
            "Opp": other.capitalize(),
            "S": side[0].upper(),
        }
    masculine, feminine = ("derecho", "derecha") if right else ("izquierdo", "izquierda")
    opposite_m, opposite_f = ("izquierdo", "izquierda") if right else ("derecho", "derecha")
    return {
        "varon": "mujer" if female else "varón",
        "Varon": "Mujer" if female else "Varón",
        "o": "a" if female else "o",
        "El": "La" if female else "El",
        "lado": masculine,
        "lada": feminine,
        "clado": opposite_m,
        "clada": opposite_f,
    }


def signs(problem: Problem, rng: random.Random) -> dict[str, str]:
    """Vital signs at first contact (suffix 0) and once better (suffix 1)."""

    def pressure(low: int, high: int) -> str:
        systolic = rng.randint(low, high)
        return f"{systolic}/{round(systolic * rng.uniform(0.54, 0.62))}"

    low, high = problem.temperature
    return {
        "t0": f"{rng.uniform(low, high):.1f}",
        "t1": f"{rng.uniform(36.2, 37.1):.1f}",
        "hr0": str(rng.randint(*problem.pulse)),
        "hr1": str(rng.randint(64, 88)),
        "bp0": pressure(*problem.systolic),
        "bp1": pressure(max(108, min(problem.systolic[0], 138)), 150),
        "rr0": str(rng.randint(*problem.breaths)),
        "rr1": str(rng.randint(14, 18)),
        "sat0": str(rng.randint(*problem.saturation)),
        "sat1": str(rng.randint(max(90, problem.saturation[0]), 97)),
    }


def home_medication(found: list[str], skip: tuple[str, ...], frames: Frames, case: Case) -> list[str]:
    rng = case.rng
    lines: list[str] = []
    for condition in found:
        if condition in skip:
            continue
        options = [f for f in frames.of("common", f"med.{condition}") if case.admits(f.text)]
        count = 2 if condition in ("dm2", "copd", "af", "asthma") else 1
        for frame in rng.sample(options, min(count, len(options))):
            lines.append(case.fill(frame.text))
    for frame in rng.sample(frames.of("common", "othermed"), rng.choice((0, 1, 1, 2))):
        lines.append(case.fill(frame.text))
    return lines


def one_of(frames: list[Frame], case: Case) -> str:
    return case.fill(case.rng.choice([f.text for f in frames if case.admits(f.text)]))


def draw_case(
    language: str, kind: str, frames: Frames, rng: random.Random, cases_so_far: dict[str, int]
) -> tuple[Case, str, dict[str, list[Frame]]]:
    """A case for a note of this kind: the case, the name of its problem, and frames made for it alone."""
    problems = problems_for(kind, frames)
    name = min(problems, key=lambda p: cases_so_far.get(p, 0) + 1.5 * rng.random())
    problem = problems[name]
    age, sex = rng.randint(*problem.age), rng.choice(problem.sex)
    side = rng.choice(("right", "left"))
    found = comorbidities(problem, age, sex, rng) if age >= 18 else []
    phase = "in" if kind in ("triage", "consult") else "hosp"
    tags = {
        sex,
        side,
        phase,
        "old" if age >= 68 else "adult",
        *found,
        *((rng.choice(problem.variants),) if problem.variants else ()),
    }
    values = {
        "age": str(age),
        "day": str(rng.randint(2, 5)),
        "studykind": "",
        **wording(language, age, sex, side),
        **signs(problem, rng),
    }
    weight = round(13 + 2.3 * (age - 3) + rng.uniform(0.5, 2.5)) if age < 18 else 0
    values |= {
        "kg": str(weight),
        "ibu": str(weight * 10),
        "apap": str(weight * 15),
        "aml": f"{round(weight * 45 / 80 * 2) / 2:g}",
    }
    case = Case(rng, tags, values)

    shown = [c for c in found if c not in problem.always] or found
    conditions = [one_of(frames.of("common", f"cond.{c}"), case) for c in shown]
    values["pmh"] = ", ".join(conditions)
    for key in ("name", "cc", "call"):
        if frames.of(name, key):
            values[key] = one_of(frames.of(name, key), case)
    values.setdefault("call", values.get("cc", ""))
    if "name" in values:
        values["Name"] = values["name"][:1].upper() + values["name"][1:]
    replaced = problem.replaces if kind in ("discharge", "medication") else ()
    medication = home_medication(found, replaced, frames, case)
    if kind == "triage":
        medication = medication[:3]
    values["medlist"] = "; ".join(medication)
    singles = [line for line in medication if "," not in line] or medication
    values["medshort"] = rng.choice(singles) if singles else {"en": "none", "es": "ninguna"}[language]
    values["medone"] = rng.choice(singles) if singles else values["medshort"]

    def own(key: str, *texts: str) -> list[Frame]:
        return [Frame(name, key, text) for text in texts]

    made = {
        "homemeds": own("homemeds", *medication),
        "ownplan": frames.of(name, "plan"),
        "owninstr": frames.of(name, "instr"),
    }
    if "name" in values:
        made["dxline"] = own("dxline", "$Name; $pmh", "$Name, $pmh")
        made["dxname"] = own("dxname", "$Name")
        made["pmhline"] = own("pmhline", "$pmh")
    if "cc" in values:
        lines = {
            "en": ("$age$sex c/o $cc", "$age {yo|y/o} $sex, $cc", "$cc in $age {yo|y.o.} $man"),
            "es": ("$Varon de $age años, $cc", "$age años, $varon. MC: $cc", "$cc ($varon, $age años)"),
        }[language]
        made["ccline"] = own("ccline", *lines)
        made["indicationline"] = own("indicationline", *(line.replace(". MC:", ",") for line in lines))
    for frame in frames.of(name, "study")[:1]:
        values["studykind"], title = frame.text.split("|", 1)
        made["studytitle"] = own("studytitle", title)
    return case, name, made
