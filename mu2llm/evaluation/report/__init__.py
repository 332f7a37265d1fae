"""report.html: one self-contained page about an evaluation, light or dark as the reader has it."""

from mu2llm.evaluation.report.page import write_report

__all__ = ["write_report"]
