"""CRIMSON (arXiv 2603.06183): its own prompt, parser and score, from the package crimson-score.

It asks for the abnormal findings of both reports, weighs each (urgent 1, actionable ½, minor ¼, benign 0) and scores
−1 … 1: 1 is a report without error, 0 no better than a normal template, below 0 more false than right. Its prompt
speaks of chest X-rays. Patient context is not given to it: our cases have none.
"""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from mu2llm import private_apis
from mu2llm.errors import UserError
from mu2llm.green.parser import Unreadable, spoken
from mu2llm.records import Judgement

MAX_NEW_TOKENS = 8192
"""What its answers may take, as published: each finding is listed."""
REQUEST: dict[str, Any] = {
    "messages": [
        {
            "role": "system",  # the package keeps it within its own client
            "content": "You are an expert radiology evaluator that assesses the accuracy of radiology reports.",
        }
    ],
    "seed": 42,
    "response_format": {"type": "json_object"},
}
_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
_MATTERS = ("urgent", "actionable_not_urgent")
_CATEGORIES = {"location": "c", "temporal": "f"}


class _Finding(BaseModel):
    id: str
    finding: str
    clinical_significance: str


class _Match(BaseModel):
    ref_id: str
    pred_id: str


class _Attribute(_Match):
    severity: str
    error_types: list[str]
    explanation: str = ""


class _Errors(BaseModel):
    false_findings: list[str]
    missing_findings: list[str]
    attribute_errors: list[_Attribute]


class _Answer(BaseModel):
    """What the prompt asks for. An empty object would score 1 by the formula."""

    reference_findings: list[_Finding]
    predicted_findings: list[_Finding]
    matched_findings: list[_Match]
    errors: _Errors


class Crimson:
    """The rubric of a model; a UserError where the package is not installed."""

    measures, by_section = "crimson", False

    def __init__(self, model: str) -> None:
        try:
            self._scorer = private_apis.crimson_scorer(model)
        except ImportError as error:
            raise UserError(
                f"judge crimson:{model}@…: the package crimson-score is not installed; pip install 'mu2llm[crimson]'"
            ) from error
        self.version = f"crimson-score {importlib.metadata.version('crimson-score')}"

    def fill(self, reference: str, candidate: str) -> str:
        return private_apis.crimson_prompt(self._scorer, reference, candidate)

    def read(self, answer: str) -> Judgement:
        """The published score. Errors in urgent or actionable findings, and significant attributes, are significant;
        false findings are (a), missing ones (b), location (c), what is compared (f), all other attributes (d)."""
        try:
            text = spoken(answer)
            given, score = private_apis.crimson_score(
                self._scorer, match[1] if (match := _FENCE.fullmatch(text)) else text
            )
            found = _Answer.model_validate(given)
        except (Unreadable, ValidationError, ValueError, LookupError, TypeError, AttributeError) as error:
            why = str(error) if isinstance(error, Unreadable) else "the answer is not the JSON that CRIMSON asks for"
            return Judgement(valid=False, score=None, why=f"{why} ({type(error).__name__})")
        return _judgement(found, score)


def _judgement(found: _Answer, score: float) -> Judgement:
    known = {each.id: each for each in (*found.reference_findings, *found.predicted_findings)}
    errors: dict[bool, dict[str, list[str]]] = {matters: {c: [] for c in "abcdef"} for matters in (True, False)}
    for category, ids in (("a", found.errors.false_findings), ("b", found.errors.missing_findings)):
        for each in ids:
            named = known.get(each)
            matters = named is not None and named.clinical_significance in _MATTERS
            errors[matters][category].append(named.finding if named else each)
    for attribute in found.errors.attribute_errors:
        category = next((_CATEGORIES[kind] for kind in attribute.error_types if kind in _CATEGORIES), "d")
        errors[attribute.severity == "significant"][category].append(attribute.explanation or attribute.ref_id)
    matched = list(dict.fromkeys(each.ref_id for each in found.matched_findings))
    significant, insignificant = (tuple(tuple(said) for said in errors[matters].values()) for matters in (True, False))
    return Judgement(
        valid=True,
        score=score,
        significant=tuple(len(said) for said in significant),
        insignificant=tuple(len(said) for said in insignificant),
        matched=len(matched),
        significant_sentences=significant,
        insignificant_sentences=insignificant,
        matched_sentences=tuple(known[each].finding if each in known else each for each in matched),
    )
