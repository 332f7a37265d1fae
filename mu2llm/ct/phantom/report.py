"""The words of a phantom: findings → a free-text report, and the answers to questions about one region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
DENIED_TOGETHER: dict[tuple[str, str], tuple[str, ...]] = {
    ("consolidation", "lung nodule"): (
        "No consolidation or lung nodule.",
        "There is no consolidation or pulmonary nodule.",
        "The lungs are clear without consolidation or nodule.",
    ),
    ("pleural effusion", "pneumothorax"): (
        "No pleural effusion or pneumothorax.",
        "There is no pleural effusion or pneumothorax.",
        "The pleural spaces are clear without effusion or pneumothorax.",
    ),
}
"""What radiologists deny in one breath, where neither is there."""
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
        ("consolidation", "lung nodule", "pleural effusion", "pneumothorax", "pericardial effusion"), "chest"
    ),
    **dict.fromkeys(("liver lesion", "renal cyst"), "abdomen"),
    "vertebral sclerosis": "bones",
}
"""Where a finding is described; in the order in which radiologists describe: lungs, pleura, heart, abdomen, bones."""
URGENCY = (
    "pneumothorax",
    "consolidation",
    "pleural effusion",
    "pericardial effusion",
    "lung nodule",
    "liver lesion",
    "vertebral sclerosis",
    "renal cyst",
)
"""The order of the impression."""
QUESTIONS: dict[str, tuple[str, ...]] = {
    "chest": ("Describe the findings in the chest.", "What does the scan show in the chest?"),
    "abdomen": ("Describe the findings in the abdomen.", "What does the scan show in the abdomen?"),
    "bones": ("Describe the findings in the bones.", "What does the scan show in the bones?"),
}


READERS = 5
HABIT = 0.9  # how often a reader writes as always; the order of a report, each sentence by itself


def write_report(plan: Plan, rng: np.random.Generator) -> tuple[str, tuple[Question, ...]]:
    """Findings → report and one question a region, as one of `READERS` radiologists writes it.

    Each has an order, phrases, units and normal structures of their own, and leaves some of what is absent unsaid. Now
    and then they deviate, so that nothing can be read off the order or the words of a report.
    """
    reader = _Reader(int(rng.integers(READERS)), rng)
    sentences = {region: reader.describe(region, plan) for region in NORMAL}
    named = [name for name in URGENCY if name in plan]
    order = list(sentences)
    if rng.uniform() > HABIT:
        for part in (order, named, *sentences.values()):
            rng.shuffle(part)
    body = " ".join(sentence for region in order for sentence in sentences[region])
    summary = [reader.fill(reader.phrase(SUMMARY[name]), plan[name]) for name in named]
    impression = " ".join(summary) or reader.phrase(NOTHING)
    questions = tuple(
        Question(question=reader.phrase(QUESTIONS[region]), answer=" ".join(sentences[region]), region=region)
        for region in order
    )
    return f"Findings: {body} Impression: {impression}", questions


@dataclass(frozen=True)
class _Reader:
    """A radiologist: `number` is whose habits these are."""

    number: int
    rng: np.random.Generator

    def phrase(self, choices: Sequence[str]) -> str:
        """The reader's own, or now and then any."""
        usual = self.rng.uniform() < HABIT
        return choices[self.number % len(choices) if usual else int(self.rng.integers(len(choices)))]

    def describe(self, region: str, plan: Plan) -> list[str]:
        """Findings and what is absent in the order of `REGION`, then what is normal."""
        names = [name for name, where in REGION.items() if where == region]
        written: list[str] = []
        denied: set[str] = set()
        for name in names:
            if name in plan:
                written.append(self.fill(self.phrase(POSITIVE[name]), plan[name]))
            elif name not in denied:
                written += self._deny(name, plan, denied)
        normal = NORMAL[region]
        return written + [normal[(self.number + i) % len(normal)] for i in range(1 if region == "bones" else 2)]

    def _deny(self, name: str, plan: Plan, denied: set[str]) -> list[str]:
        for pair, phrases in DENIED_TOGETHER.items():
            if name in pair and not set(pair) & set(plan) and self.number % 2 == 0:
                denied |= set(pair)
                return [self.phrase(phrases)]
        unsaid = list(REGION).index(name) % READERS == self.number and self.rng.uniform() < HABIT
        return [] if unsaid else [self.phrase(NEGATIVE[name])]

    def fill(self, template: str, item: Planted) -> str:
        finding, size = item.finding, item.finding.size_mm or 0
        text = template.format(
            amount="large" if item.extent > 0.5 else "moderate",
            side=finding.side,
            lobe=finding.place,
            level=finding.place,
            size=f"{size / 10:g} cm" if self.number % 2 else f"{size:g} mm",
        )
        return text[0].upper() + text[1:]
