"""The paper's own numbers (arXiv 2507.00316, tables 1 and 2), to stand beside ours."""

from __future__ import annotations

SOURCE = "arXiv 2507.00316"
WHY = (
    "one sampled report a case, no intervals; splits not published; "
    "GREEN by a 7B judge and BERTScore by another encoder than ours"
)
COLUMNS = ("rouge_1", "meteor", "bert_score", "green")
TABLE_1: dict[str, dict[str, tuple[float | None, ...]]] = {
    "AbdomenAtlas": {
        "LaMed-Phi-3-4B": (0.136, 0.058, 0.807, 0.011),
        "LaMed-Llama-2-7B": (0.139, 0.060, 0.810, 0.009),
        "RadFM-14B": (0.037, 0.013, 0.794, 0.000),
        "RadGPT-N": (0.247, 0.112, None, None),
        "μ²LLM-1B (SFT)": (0.529, 0.295, 0.891, 0.281),
        "μ²LLM-1B (SFT&DPO)": (0.567, 0.319, 0.895, 0.346),
    },
    "CT-RATE": {
        "LaMed-Phi-3-4B": (0.130, 0.050, 0.814, 0.002),
        "LaMed-Llama-2-7B": (0.103, 0.048, 0.815, 0.001),
        "RadFM-14B": (0.054, 0.017, 0.812, 0.014),
        "CT-CHAT-8B": (0.294, 0.221, 0.815, 0.113),
        "μ²LLM-1B (SFT)": (0.517, 0.330, 0.879, 0.384),
        "μ²LLM-1B (SFT&DPO)": (0.539, 0.359, 0.890, 0.429),
    },
    "AMOS-MM": {
        "LaMed-Phi-3-4B": (0.126, 0.047, 0.821, 0.009),
        "LaMed-Llama-2-7B": (0.163, 0.065, 0.823, 0.009),
        "RadFM-14B": (0.046, 0.015, 0.812, 0.001),
        "μ²LLM-1B (SFT)": (0.421, 0.249, 0.881, 0.339),
        "μ²LLM-1B (SFT&DPO)": (0.459, None, 0.881, 0.400),
    },
}
"""Dataset → model → `COLUMNS`. The METEOR of the last row is left out: the printed 0.876 cannot be one."""
TABLE_2: dict[str, tuple[float | None, ...]] = {
    "Baseline (LinVT)": (0.190, 0.405, 0.210, 0.864, 0.204),
    "+RPE": (0.281, 0.421, 0.236, 0.880, 0.277),
    "+DTS": (0.271, 0.411, 0.240, 0.888, 0.299),
    "+DMTP": (0.254, 0.401, 0.220, 0.874, 0.233),
    "μ²LLM-1B (SFT)": (0.279, 0.421, 0.249, 0.881, 0.339),
    "μ²LLM-1B (SFT&DPO)": (0.336, 0.459, None, 0.881, 0.400),
}
"""The ablation, on AMOS-MM: model → BLEU-1 and `COLUMNS`."""
