"""mu2llm: train, sweep, evaluate and serve μ²LLM, which writes the radiology report of a CT scan."""

from importlib.metadata import version

__version__ = version("mu2llm")
