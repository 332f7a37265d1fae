"""mu2llm: train, sweep, evaluate and serve μ²LLM, which writes the radiology report of a CT scan."""

import gc
from importlib.metadata import version

__version__ = version("mu2llm")

# torch and transformers make a million objects that stay; with Python's 700 a sixth of the CPU that a process takes to
# start goes into looking for garbage among them
gc.set_threshold(50_000, 10, 10)
