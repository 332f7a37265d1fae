"""The values of DICOM tags as they stand in a file, whatever VR they were written with."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pydicom
from pydicom.multival import MultiValue
from pydicom.tag import Tag

_BINARY = ("US", "UL", "SS", "SL", "FD", "FL", "AT")


class Unreadable(ValueError):
    """A tag whose value cannot be read; its message names both."""


tag = functools.cache(Tag)  # by keyword, which takes pydicom as long as reading a value


def holder(header: pydicom.Dataset, groups: list[pydicom.Dataset], sequence: str, name: str) -> pydicom.Dataset:
    """Where an attribute of a frame stands: in a `sequence` of the first of its functional groups (its own, the shared
    ones) that has it, else at the top level."""
    for group in groups:
        for item in list(group.get(sequence) or [])[:1] if sequence else []:
            if name in item:
                return item
    return header


def value(dataset: pydicom.Dataset, name: str) -> Any:
    """A value as pydicom has it, None where it is missing; Unreadable where pydicom cannot read it."""
    try:
        element = dataset.get(tag(name))
        return None if element is None else element.value
    except Exception as error:  # pydicom raises many kinds
        raise Unreadable(f"{name} is {dataset.get_item(name).value!r}, which cannot be read") from error


def text(dataset: pydicom.Dataset, name: str) -> str:
    """A value as text, its parts between backslashes; empty where it is missing. Most are taken as they stand in the
    file, without pydicom's conversions."""
    element = dataset.get_item(tag(name))
    found = None if element is None else element.value
    if isinstance(found, bytes):
        if element.VR not in _BINARY:
            return found.decode("latin-1").strip(" \0")
        found = value(dataset, name)
    if found is None:
        return ""
    return "\\".join(map(str, found)) if isinstance(found, list | MultiValue) else str(found)


def numbers(dataset: pydicom.Dataset, name: str, count: int) -> tuple[float, ...] | None:
    """The `count` numbers of a tag, a decimal comma read as meant; None where it is missing or empty, Unreadable where
    they are others."""
    found = text(dataset, name).replace("\0", "").strip()
    if not found:
        return None
    try:
        values = tuple(float(each.replace(",", ".")) for each in found.split("\\"))
    except ValueError:
        values = ()
    if len(values) != count or not np.isfinite(values).all():
        raise Unreadable(f"{name} is {found!r}, expected {count} number{'s' if count > 1 else ''}")
    return values
