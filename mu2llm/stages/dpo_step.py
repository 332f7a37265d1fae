"""A training step of DPO: trl's trainer over our batches. Nothing of Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from mu2llm.model import Mu2Processor
from mu2llm.records import PreferencePair
from mu2llm.settings.stages import DpoConfig
from mu2llm.stages.steps import Streamed, scan_inputs


def loss_arguments(settings: DpoConfig) -> dict[str, Any]:
    """Our settings in trl's names."""
    return {
        "beta": settings.beta,
        "loss_type": list(settings.loss),
        "loss_weights": list(settings.loss_weights) if settings.loss_weights else None,
        "label_smoothing": settings.label_smoothing,
        "ld_alpha": settings.ld_alpha,
        "precompute_ref_log_probs": True,
        "max_length": None,
        "disable_dropout": True,
    }


class Examples:
    """The pairs as token ids, and the batches made of them and of the streamed scans."""

    def __init__(self, pairs: list[PreferencePair], reference: np.ndarray | None, processor: Mu2Processor) -> None:
        self.pairs, self.reference, self.processor = pairs, reference, processor
        self.collator = DataCollatorForPreference(pad_token_id=processor.tokenizer.pad_token_id)

    def collate(self, rows: dict[str, Any], scan: str) -> dict[str, Any]:
        """Streamed rows (`item` is the pair's number) → trl's batch: chosen, then rejected, over B scans.

        The model serves each scan's tokens to adjoining rows, trl puts all chosen before all rejected: so the
        scans come as they are, and `tile_scans` is set.
        """
        numbers = [int(item) for item in rows["item"]]
        batch = self.collator([self.example(number) for number in numbers])
        questions = self.processor.encode([self.pairs[number].prompt for number in numbers])
        return {
            "case_ids": list(rows["id"]),
            **scan_inputs(rows, scan),
            "question_ids": questions["question_ids"],
            "question_mask": questions["question_mask"],
            "tile_scans": True,
            "right_padded": True,
            **batch,
        }

    def example(self, number: int) -> dict[str, Any]:
        pair = self.pairs[number]
        prompt, chosen = self.processor.token_ids(pair.prompt, pair.chosen)
        _, rejected = self.processor.token_ids(pair.prompt, pair.rejected)
        example: dict[str, Any] = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        if self.reference is not None:
            example["ref_chosen_logps"], example["ref_rejected_logps"] = self.reference[number].tolist()
        return example


class Mu2DPOTrainer(Streamed, DPOTrainer):
    """trl's trainer on our stream: what it would do to a dataset of its own falls away.

    Beside what trl logs: `lengths/chosen` and `lengths/rejected` in tokens, and `kl`, the mean of
    log reference − log policy over the reports; of reports that the reference sampled that is an estimate of
    KL(reference ‖ policy), in nats a report.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.is_fsdp_enabled = self.accelerator.is_fsdp2

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = (
            False  # while trl sets itself up: it would load a reference model, which nothing here needs
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with _left_on_the_device(self.accelerator):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            metrics = self._metrics["train" if model.training else "eval"]
            lengths = self.accelerator.gather(inputs["completion_mask"].sum(1)[None].float())
        for kind, each in zip(("chosen", "rejected"), lengths.chunk(2, dim=1), strict=True):
            metrics[f"lengths/{kind}"].append(each.mean())
        rewards = metrics["rewards/chosen"][-1] + metrics["rewards/rejected"][-1]
        metrics["kl"].append(-rewards / (2 * self.beta))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for metrics in self._metrics.values():
            numbers = [value for values in metrics.values() for value in values if isinstance(value, torch.Tensor)]
            if numbers:  # one transfer for all
                fetched = iter(torch.stack([each.as_subclass(torch.Tensor).double() for each in numbers]).tolist())
                for name, values in metrics.items():
                    metrics[name] = [next(fetched) if isinstance(each, torch.Tensor) else each for each in values]
        self._total_train_tokens = int(self._total_train_tokens)
        super().log(logs, *args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super(DPOTrainer, self)._save_checkpoint(model, trial)  # without a model card for every few steps


class _Number(torch.Tensor):
    """A number on the device that trl asks for in every step: it stays there until it is logged."""

    def item(self) -> Any:
        return self

    def __bool__(self) -> bool:
        return True  # trl asks whether there are any tokens: there are, as every answer has an end


@contextlib.contextmanager
def _left_on_the_device(accelerator: Any) -> Iterator[None]:
    """In it what an accelerator gathers, which is what trl makes its metrics of, is not waited for."""
    names = ("gather", "gather_for_metrics")
    given = {name: getattr(accelerator, name) for name in names}

    def lazy(name: str) -> Any:
        return lambda tensor: given[name](tensor.detach()).as_subclass(_Number)

    try:
        for name in names:
            setattr(accelerator, name, lazy(name))
        yield
    finally:
        for name in names:
            delattr(accelerator, name)
