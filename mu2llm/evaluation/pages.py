"""What the HTML pages share: how their templates are read, and the files of the report's folder, such as its style."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined

REPORT = "mu2llm.evaluation.report"


def environment(package: str = REPORT) -> Environment:
    """Reads the templates of a package's folder; a name that a template does not get is an error."""
    return Environment(
        loader=PackageLoader(package, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def source(name: str) -> str:
    """The text of a file in the report's folder."""
    return (files(REPORT) / name).read_text(encoding="utf-8")
