"""Sweeps over the tokenizer and over DPO, and the paper's ablation, on Ray Tune."""
