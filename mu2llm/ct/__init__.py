"""One scan: any file → CTVolume in HU → model input. Knows nothing of Ray, of models, or of many scans."""

from mu2llm.ct.augment import augment, augment_batch
from mu2llm.ct.codes import ACCEPTABLE, REASONS, WARNINGS, Acceptable
from mu2llm.ct.inspection import describe, inspect, three_planes
from mu2llm.ct.preprocess import SPECS, ModelInput, input_key, prepare, tiled, warnings, whole
from mu2llm.ct.reading import read, read_several
from mu2llm.ct.volume import CTVolume, admit, usable
from mu2llm.errors import Rejection
from mu2llm.records import PreprocessSpec

__all__ = [
    "ACCEPTABLE",
    "REASONS",
    "SPECS",
    "WARNINGS",
    "Acceptable",
    "CTVolume",
    "ModelInput",
    "PreprocessSpec",
    "Rejection",
    "admit",
    "augment",
    "augment_batch",
    "describe",
    "input_key",
    "inspect",
    "prepare",
    "read",
    "read_several",
    "three_planes",
    "tiled",
    "usable",
    "warnings",
    "whole",
]
