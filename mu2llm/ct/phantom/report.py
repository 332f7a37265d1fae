"""The words of a phantom: findings → a free-text report, and the answers to questions about one region."""

from __future__ import annotations

import numpy as np

from mu2llm.ct.phantom.plan import Plan, Planted
from mu2llm.records import Question

POSITIVE: dict[str, tuple[str, ...]] = {
    "pleural effusion": (
        "There is a {amount} {side} pleural effusion.",
        "A {amount} {side} pleural effusion is present.",
        "{amount} pleural effusion on the {side}.",
        "{side} pleural effusion, {amount} in volume.",
        "A {amount} {side}-sided pleural effusion layers posteriorly.",
        "Fluid layers dependently on the {side}, consistent with a {amount} pleural effusion.",
    ),
    "pneumothorax": (
        "There is a {amount} {side} pneumothorax.",
        "A {amount} pneumothorax is present on the {side}.",
        "{amount} {side} pneumothorax.",
        "{side}-sided pneumothorax with partial collapse of the lung.",
        "The {side} lung is partially collapsed by a {amount} pneumothorax.",
    ),
    "consolidation": (
        "There is consolidation in the {side} {lobe}.",
        "Airspace consolidation is present in the {side} {lobe}.",
        "The {side} {lobe} shows dense consolidation.",
        "Focal consolidation of the {side} {lobe}.",
        "{side} {lobe} consolidation with ill-defined margins.",
    ),
    "lung nodule": (
        "There is a {size} nodule in the {side} {lobe}.",
        "A solid {size} lung nodule is present in the {side} {lobe}.",
        "{side} {lobe} nodule measuring {size}.",
        "Solid pulmonary nodule of {size} in the {side} {lobe}.",
        "The {side} {lobe} contains a {size} solid nodule.",
    ),
    "pericardial effusion": (
        "There is a {amount} pericardial effusion.",
        "A {amount} pericardial effusion surrounds the heart.",
        "{amount} circumferential pericardial effusion.",
        "Fluid surrounds the heart, consistent with a pericardial effusion.",
        "Pericardial effusion is present, {amount} in volume.",
    ),
    "liver lesion": (
        "There is a {size} hypodense lesion in the liver.",
        "A hypodense liver lesion measures {size}.",
        "The liver contains a {size} hypodense lesion.",
        "Hypodense hepatic lesion measuring {size}.",
        "Focal liver lesion of low attenuation, {size} in diameter.",
    ),
    "renal cyst": (
        "There is a {size} simple cyst in the {side} kidney.",
        "A {side} renal cyst measures {size}.",
        "The {side} kidney contains a {size} cyst.",
        "Simple {side} renal cyst of {size}.",
        "{side} renal cyst measuring {size}.",
    ),
    "vertebral sclerosis": (
        "There is sclerosis of the {level} vertebral body.",
        "The {level} vertebral body is diffusely sclerotic.",
        "Sclerotic {level} vertebral body.",
        "Dense vertebral sclerosis at {level}.",
        "The {level} vertebra shows diffuse sclerosis.",
    ),
}
NEGATIVE: dict[str, tuple[str, ...]] = {
    "pleural effusion": (
        "No pleural effusion.",
        "There is no pleural effusion.",
        "No evidence of pleural effusion.",
        "Pleural effusion is not seen.",
    ),
    "pneumothorax": (
        "No pneumothorax.",
        "There is no pneumothorax.",
        "No evidence of pneumothorax.",
        "Pneumothorax is not seen.",
    ),
    "consolidation": (
        "No consolidation.",
        "There is no airspace consolidation.",
        "No focal consolidation is seen.",
        "The lungs are without consolidation.",
    ),
    "lung nodule": (
        "No lung nodule.",
        "There is no pulmonary nodule.",
        "No suspicious lung nodule is seen.",
        "No solid nodule in either lung.",
    ),
    "pericardial effusion": (
        "No pericardial effusion.",
        "There is no pericardial effusion.",
        "Pericardial effusion is not seen.",
        "The pericardium is normal without effusion.",
    ),
    "liver lesion": (
        "No focal liver lesion.",
        "The liver is homogeneous without focal lesion.",
        "There is no liver lesion.",
        "No hypodense hepatic lesion is seen.",
    ),
    "renal cyst": (
        "No renal cyst.",
        "The kidneys enhance normally without cyst.",
        "There is no renal cyst.",
        "No cyst is seen in the kidneys.",
    ),
    "vertebral sclerosis": (
        "No vertebral sclerosis.",
        "The vertebral bodies are without sclerosis.",
        "There is no vertebral sclerosis.",
        "Vertebral density is normal without sclerosis.",
    ),
}
PLEURAL = ("pleural effusion", "pneumothorax")
PLEURAE_CLEAR = (
    "No pleural effusion or pneumothorax.",
    "There is no pleural effusion or pneumothorax.",
    "The pleural spaces are clear without effusion or pneumothorax.",
)
NORMAL: dict[str, tuple[str, ...]] = {
    "chest": (
        "The heart is normal in size.",
        "The thoracic aorta is normal in calibre.",
        "The trachea and main bronchi are patent.",
        "Mediastinal contours are normal.",
    ),
    "abdomen": (
        "The spleen is normal in size.",
        "The stomach and bowel are unremarkable.",
        "The abdominal aorta is normal in calibre.",
        "The gallbladder is unremarkable.",
    ),
    "bones": (
        "The ribs are intact.",
        "Alignment of the spine is normal.",
        "The sternum is unremarkable.",
        "Vertebral heights are preserved.",
    ),
}
SUMMARY: dict[str, tuple[str, ...]] = {
    "pleural effusion": ("{side} pleural effusion.", "{amount} {side} pleural effusion."),
    "pneumothorax": ("{side} pneumothorax.", "{amount} {side} pneumothorax."),
    "consolidation": ("{side} {lobe} consolidation.", "Consolidation in the {side} {lobe}."),
    "lung nodule": ("{side} {lobe} nodule.", "Solid nodule in the {side} {lobe}."),
    "pericardial effusion": ("Pericardial effusion.", "{amount} pericardial effusion."),
    "liver lesion": ("Hypodense liver lesion.", "Liver lesion of {size}."),
    "renal cyst": ("{side} renal cyst.", "Simple cyst of the {side} kidney."),
    "vertebral sclerosis": ("Sclerosis of {level}.", "Vertebral sclerosis at {level}."),
}
NOTHING = (
    "No acute abnormality.",
    "No acute abnormality of the chest or abdomen.",
    "Normal examination of the chest and abdomen.",
    "No significant abnormality.",
    "Unremarkable CT of the chest and abdomen.",
)
REGION = {
    **dict.fromkeys(
        ("pleural effusion", "pneumothorax", "consolidation", "lung nodule", "pericardial effusion"), "chest"
    ),
    **dict.fromkeys(("liver lesion", "renal cyst"), "abdomen"),
    "vertebral sclerosis": "bones",
}
QUESTIONS: dict[str, tuple[str, ...]] = {
    "chest": ("Describe the findings in the chest.", "What does the scan show in the chest?"),
    "abdomen": ("Describe the findings in the abdomen.", "What does the scan show in the abdomen?"),
    "bones": ("Describe the findings in the bones.", "What does the scan show in the bones?"),
}


def write_report(plan: Plan, rng: np.random.Generator) -> tuple[str, tuple[Question, ...]]:
    """Findings → report and one question a region; most of what is absent is denied."""
    sentences = {region: _sentences(region, plan, rng) for region in NORMAL}
    order = list(sentences)
    rng.shuffle(order)
    body = " ".join(sentence for region in order for sentence in sentences[region])
    summary = [_fill(_pick(SUMMARY[name], rng), item, rng) for name, item in plan.items()]
    rng.shuffle(summary)
    impression = " ".join(summary) or _pick(NOTHING, rng)
    questions = tuple(
        Question(question=_pick(QUESTIONS[region], rng), answer=" ".join(sentences[region]), region=region)
        for region in order
    )
    return f"Findings: {body} Impression: {impression}", questions


def _sentences(region: str, plan: Plan, rng: np.random.Generator) -> list[str]:
    names = [name for name, where in REGION.items() if where == region]
    chosen = [_fill(_pick(POSITIVE[name], rng), plan[name], rng) for name in names if name in plan]
    absent = [name for name in names if name not in plan]
    if set(PLEURAL) <= set(absent) and rng.uniform() < 0.5:
        absent = [name for name in absent if name not in PLEURAL]
        chosen.append(_pick(PLEURAE_CLEAR, rng))
    chosen += [_pick(NEGATIVE[name], rng) for name in absent if rng.uniform() < 0.85]
    normal = rng.permutation(len(NORMAL[region]))[: 1 if region == "bones" else 2]
    chosen += [NORMAL[region][number] for number in normal]
    rng.shuffle(chosen)
    return chosen


def _fill(template: str, item: Planted, rng: np.random.Generator) -> str:
    finding, size = item.finding, item.finding.size_mm or 0
    text = template.format(
        amount="large" if item.extent > 0.5 else "moderate",
        side=finding.side,
        lobe=finding.place,
        level=finding.place,
        size=f"{size / 10:g} cm" if rng.uniform() < 0.5 else f"{size:g} mm",
    )
    return text[0].upper() + text[1:]


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
