"""Where a model meets data in inference: its device and precision, its actors, the one decoder."""
