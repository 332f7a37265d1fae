"""Procedural CT phantoms of chest and abdomen: volumes in HU with findings and reports, all from one seed.

They look like CT and are read like CT, but a phantom is not a patient: what a model reaches on them says that the
pipeline works, and nothing about medicine.
"""

from mu2llm.ct.phantom.making import Phantom, make
from mu2llm.ct.phantom.plan import FINDINGS
from mu2llm.ct.phantom.writing import write

__all__ = ["FINDINGS", "Phantom", "make", "write"]
