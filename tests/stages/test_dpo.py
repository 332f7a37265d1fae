"""DPO's parts without workers: policy and reference by the same numbers."""

import datasets
import numpy as np
import pytest
import torch
from small_models import QUESTION, TEXTS, make, scans
from transformers import TrainerCallback
from trl import DPOConfig

from mu2llm.config import load as load_preset
from mu2llm.engine.log_probabilities import sequence_logps
from mu2llm.model import add_lora
from mu2llm.records import PreferencePair
from mu2llm.settings.model import LoraSettings
from mu2llm.stages import dpo

STANDARDISED = {
    "vision": {"standardise": True, "standardise_input": True, "stem": "conv"},
    "tokenizer": {"standardise": True, "temperature_mode": "annealed"},
}


def pairs(count):
    values = {"prompt": QUESTION, "chosen_score": 1.0, "rejected_score": 0.0, "judge": "rules"}
    return [
        PreferencePair(case_id=str(i), chosen=TEXTS[i % 2], rejected=TEXTS[1 - i % 2], **values) for i in range(count)
    ]


class Statistics(TrainerCallback):
    """How far running statistics have moved when the training ends."""

    def on_train_begin(self, *_, model, **__):
        self.before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def on_train_end(self, *_, model, **__):
        self.moved = [n for n, buffer in model.named_buffers() if not torch.equal(buffer, self.before[n])]


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2, alpha=4, dropout=0.0)], ids=["whole", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rewards_start_at_zero(precision, lora, tmp_path):
    """The reference's log-probabilities, computed in larger batches before, are the policy's of the first step; running
    statistics stay as they were, also of what LoRA trains in full."""
    model, processor = make(**STANDARDISED)
    given, settings = pairs(4), load_preset("tiny", [f"dpo.precision={precision}"]).dpo
    rows = {"id": list("0123"), "item": np.arange(4), "voxels": scans(4).numpy(), "chunk_mask": np.ones((4, 2), bool)}
    whole = dpo.Examples(given, None, processor).collate(rows, "voxels")
    whole.pop("case_ids")
    reference = torch.stack(sequence_logps(model, whole, None, precision).chunk(2), 1).numpy()
    examples = dpo.Examples(given, reference, processor)
    arguments = {"max_steps": 2, "logging_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    arguments |= {"remove_unused_columns": False, "disable_tqdm": True, "bf16": precision == "bf16"}
    arguments |= {"learning_rate": 1e-2 if lora else 1e-3}
    statistics = Statistics()
    dpo.prepare(model, settings)
    model = add_lora(model, lora) if lora else model
    trainer = dpo.Mu2DPOTrainer(
        model=model,
        args=DPOConfig(str(tmp_path), **arguments, **dpo.loss_arguments(settings)),
        train_dataset=datasets.Dataset.from_list([{"prompt": "", "chosen": "", "rejected": ""}]),
        data_collator=examples.collator,
        processing_class=processor.tokenizer,
        callbacks=[statistics],
    )
    halves = ({name: values[i : i + 2] for name, values in rows.items()} for i in (0, 2))
    trainer.batches = [examples.collate(half, "voxels") for half in halves]
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    for kind in ("rewards/chosen", "rewards/rejected"):
        assert first[kind] == pytest.approx(0, abs=1e-3)
        assert abs(second[kind]) > 3e-3
    assert not statistics.moved and any("standardise" in name for name in statistics.before)
