"""What the notes are about: the ranges and the company of each problem."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """Ranges at first contact (beats and breaths a minute, mmHg, per cent, Celsius) and what goes with what.

    `always` and `never` are comorbidities, one of `variants` becomes a tag, and the home medication of
    `replaces` gives way to what the problem itself prescribes.
    """

    age: tuple[int, int]
    pulse: tuple[int, int] = (62, 88)
    systolic: tuple[int, int] = (112, 148)
    breaths: tuple[int, int] = (14, 18)
    saturation: tuple[int, int] = (95, 99)
    temperature: tuple[float, float] = (36.3, 37.0)
    sex: str = "fm"
    always: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()


ACUTE: dict[str, Problem] = {
    "pneumonia": Problem(
        (38, 91), (96, 118), (104, 142), (22, 30), (88, 92), (38.2, 39.4), never=("copd", "asthma")
    ),
    "copd": Problem(
        (56, 86),
        (92, 114),
        (122, 158),
        (24, 30),
        (85, 90),
        (36.6, 37.6),
        always=("copd",),
        never=("asthma",),
        replaces=("copd",),
    ),
    "heart_failure": Problem(
        (58, 89),
        (88, 112),
        (108, 158),
        (20, 28),
        (88, 93),
        (36.2, 36.9),
        always=("hf",),
        never=("copd", "asthma"),
        replaces=("hf",),
    ),
    "afib": Problem((54, 84), (122, 158), (104, 142), (16, 20), (95, 98), never=("af", "cad", "hf", "ckd")),
    "nstemi": Problem((48, 83), (72, 104), (118, 168), (16, 22), (94, 98), never=("cad", "hf", "af", "hld")),
    "pyelonephritis": Problem(
        (21, 74),
        (98, 122),
        (100, 132),
        (16, 22),
        (96, 99),
        (38.5, 39.6),
        sex="ffffm",
        never=("ckd", "cad", "hf", "af"),
    ),
    "cellulitis": Problem((34, 82), (82, 104), (118, 152), (14, 20), (95, 98), (37.6, 38.6)),
    "dka": Problem(
        (19, 42),
        (108, 132),
        (96, 122),
        (24, 32),
        (97, 99),
        (36.1, 37.0),
        always=("dm1",),
        never=("dm2", "htn", "hld", "cad", "hf", "af", "copd", "oa", "bph", "ckd"),
        replaces=("dm1",),
    ),
    "gastroenteritis_aki": Problem(
        (44, 84),
        (98, 118),
        (88, 108),
        (16, 20),
        (96, 99),
        (36.6, 37.5),
        never=("ckd", "hf", "dm2"),
        replaces=("htn",),
    ),
    "hip_fracture": Problem(
        (71, 94), (78, 102), (128, 168), (16, 20), (93, 97), sex="fffm", never=("af", "hf", "cad")
    ),
    "stroke": Problem((58, 88), (72, 96), (158, 204), (16, 20), (94, 98), never=("af", "cad", "hf", "hld")),
    "gi_bleed": Problem(
        (46, 82), (104, 126), (88, 108), (18, 22), (95, 98), never=("af", "cad", "gerd", "hf", "oa")
    ),
    "cholecystitis": Problem(
        (29, 76),
        (88, 108),
        (122, 154),
        (16, 20),
        (95, 99),
        (37.6, 38.6),
        sex="ffm",
        never=("ckd", "hf", "af", "cad"),
    ),
    "pancreatitis": Problem(
        (34, 71),
        (98, 122),
        (104, 142),
        (18, 24),
        (94, 97),
        (37.0, 38.1),
        never=("hf", "ckd", "af"),
        variants=("biliary", "etoh"),
    ),
    "dvt": Problem(
        (36, 79), (72, 94), (118, 148), (14, 18), (96, 99), never=("af", "hf"), variants=("pop", "fem")
    ),
    "appendicitis": Problem(
        (18, 46),
        (84, 108),
        (112, 138),
        (14, 20),
        (97, 99),
        (37.4, 38.4),
        never=("ckd", "cad", "hf", "af", "copd", "dm2", "hld", "htn", "oa"),
    ),
    "asthma": Problem(
        (19, 52),
        (102, 124),
        (118, 142),
        (22, 30),
        (91, 95),
        always=("asthma",),
        never=("copd", "cad", "hf", "af", "ckd"),
        replaces=("asthma",),
    ),
    "renal_colic": Problem(
        (24, 62), (84, 108), (132, 168), (16, 22), (96, 99), never=("ckd", "hf", "cad", "af")
    ),
}

VISITS: dict[str, Problem] = {
    "sciatica": Problem((29, 63), never=("ckd", "hf", "cad", "af", "oa")),
    "hypothyroid_visit": Problem((27, 72), sex="ffffm", always=("hypothyroid",)),
    "diabetes_visit": Problem((42, 78), always=("dm2",), never=("hf",)),
    "depression_visit": Problem((22, 66), always=("depression",), variants=("sert", "esc")),
    "htn_visit": Problem((41, 79), systolic=(146, 168), always=("htn",), never=("hf", "ckd")),
    "migraine_visit": Problem((21, 48), sex="fffm", always=("migraine",), never=("cad", "hf", "af", "ckd")),
    "knee_oa_visit": Problem((54, 80), always=("oa",), never=("ckd", "hf", "cad", "af")),
    "anemia_visit": Problem((24, 50), sex="f", never=("cad", "hf", "af", "ckd", "copd")),
}

TOPICS: dict[str, Problem] = {
    "med_vanco": Problem((28, 50), never=("ckd",)),
    "med_warfarin": Problem((44, 78), never=("af",)),
    "med_insulin": Problem((48, 80), always=("dm2",), replaces=("dm2",)),
    "med_recon": Problem((58, 90)),
    "med_renal": Problem((62, 88), always=("ckd",), never=("dm2",)),
    "med_opioid": Problem((38, 68), never=("ckd",)),
    "med_statin": Problem((46, 72), never=("hld", "cad", "af")),
    "med_iron": Problem((24, 70), never=("cad", "hf")),
    "med_inhaler": Problem((20, 58), always=("asthma",), never=("copd", "hf", "cad"), replaces=("asthma",)),
    "med_peds": Problem((3, 5)),
}

SPECIMENS: dict[str, Problem] = {
    "path_colon_polyp": Problem((50, 76)),
    "path_gastric_biopsy": Problem((32, 74)),
    "path_skin": Problem((56, 88), variants=("free", "pos")),
    "path_nevus": Problem((22, 58)),
    "path_breast": Problem((41, 78), sex="f"),
    "path_gallbladder": Problem((30, 74)),
    "path_thyroid": Problem((28, 68), variants=("benign", "atyp")),
}

IN_THERAPY = ("hip_fracture", "stroke", "heart_failure", "copd", "pneumonia")
ON_THE_PHONE = (
    "cellulitis",
    "pyelonephritis",
    "asthma",
    "copd",
    "heart_failure",
    "dvt",
    "renal_colic",
    "pneumonia",
)
AGE_OF_ONSET = {
    "htn": 38,
    "dm2": 40,
    "hld": 38,
    "copd": 52,
    "ckd": 60,
    "gerd": 24,
    "hypothyroid": 24,
    "depression": 19,
    "oa": 55,
    "cad": 54,
    "hf": 60,
    "af": 60,
    "bph": 60,
    "asthma": 18,
    "migraine": 18,
    "epilepsy": 18,
}
LIKELIHOOD = {
    "htn": 6,
    "dm2": 4,
    "hld": 5,
    "copd": 2,
    "ckd": 2,
    "gerd": 3,
    "hypothyroid": 2,
    "depression": 2,
    "oa": 3,
    "cad": 2,
    "hf": 1,
    "af": 2,
    "bph": 2,
    "asthma": 2,
    "migraine": 2,
    "epilepsy": 1,
}
RARE_ABOVE_AGE = {"asthma": 60, "migraine": 58, "epilepsy": 70}
