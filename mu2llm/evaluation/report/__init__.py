"""report.html: one self-contained page about an evaluation, light or dark as the reader has it."""

from mu2llm.evaluation.report.page import PAGE, write_report

__all__ = ["PAGE", "write_report"]
