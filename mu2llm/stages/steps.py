"""A training step of contrast and of SFT: HF's trainers over batches that come ready. Nothing of Ray.

In a step nothing waits for the GPU: losses and numbers stay where they are until they are logged, and every
`check_steps` they are looked at, for all of these steps at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collective
from transformers import Trainer

from mu2llm import private_apis
from mu2llm.model import Mu2Processor
from mu2llm.stages import groups
from mu2llm.stages.muon import MuonAndAdamW

_OF_THE_SCAN = ("volumes", "vision_features", "chunk_mask", "question_ids", "question_mask")
OF_THE_TEXT = ("input_ids", "attention_mask", "labels")


def scan_inputs(rows: dict[str, Any], scan: str) -> dict[str, Any]:
    """Rows of a stream with `scan`, voxels or features, → what a model takes of their scans."""
    inputs = torch.as_tensor(np.asarray(rows[scan]))
    mask = torch.as_tensor(np.asarray(rows["chunk_mask"]))
    if scan == "features":
        return {"vision_features": inputs, "chunk_mask": mask}
    return {"volumes": inputs, "chunk_mask": mask, "full_chunks": int(mask.sum())}


class Streamed:
    """Mixed into an HF Trainer: its batches come from `self.batches`, already this rank's, in order.

    A batch is a dict of tensors and the list `case_ids`, which names the cases when the loss is not finite.
    `wait_seconds` is how long the training waited, where it looked at numbers, for the GPU and the other workers.
    """

    batches: Iterable[dict[str, Any]]
    first_scan: dict[str, torch.Tensor]
    epochs_a_step: float = 0.0
    prompt_hash: str = ""  # where the model reads prompts
    rates: Mapping[str, float] = MappingProxyType({})  # by group, where they are not all the same
    muon: float | None = None  # its learning rate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unseen: list[tuple[torch.Tensor, list[str]]] = []  # losses that nobody has looked at, with their cases
        self.wait_seconds = 0.0

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.fsdp:  # type: ignore[attr-defined]
            private_apis.allow_fsdp_on_cpu()
        super().create_accelerator_and_postprocess()  # type: ignore[misc]

    def create_optimizer(self, model: Any = None) -> Any:
        new = self.optimizer is None  # type: ignore[attr-defined]
        optimiser = super().create_optimizer(model)  # type: ignore[misc]
        if new and self.rates:
            groups.split(optimiser, (model or self.model).named_parameters(), self.rates)  # type: ignore[attr-defined]
        if new and self.muon:
            optimiser = MuonAndAdamW.of(optimiser, model or self.model, self.muon)  # type: ignore[attr-defined]
            setattr(self, "optimizer", optimiser)  # noqa: B010  # HF's; named plainly, mypy takes it for ours
        return optimiser

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with private_apis.moments_may_be_missing():
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint and self.args.fsdp:  # type: ignore[attr-defined]
            groups.forget_unreached(self.optimizer)  # type: ignore[attr-defined]

    def get_train_dataloader(self) -> Any:
        return self.batches

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Batches go to the device as they are taken, before anything is counted in them."""
        moved = map(self._prepare_inputs, epoch_iterator)  # type: ignore[attr-defined]
        return super().get_batch_samples(moved, num_batches, device)  # type: ignore[misc]

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, torch.Tensor) and data.is_pinned():
            return data.to(self.args.device, non_blocking=True)  # type: ignore[attr-defined]
        return super()._prepare_input(data)  # type: ignore[misc]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        cases = inputs.pop("case_ids")
        self.first_scan = {name: value[:1] for name, value in inputs.items() if name in _OF_THE_SCAN}
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self.unseen.append((loss, cases))
        return loss

    def look(self, due: bool = False) -> bool:
        """Whether all workers say that something is `due`; NotFinite where a loss since the last look is not finite.

        It waits for the GPU and is a collective: every rank calls it after the same steps.
        """
        started = time.perf_counter()
        said = [torch.isfinite(loss).float() for loss, _ in self.unseen]
        flags = torch.stack([*said, torch.tensor(float(due)).to(self.args.device, non_blocking=True)])  # type: ignore[attr-defined]
        if dist.is_initialized():
            dist.all_reduce(flags, op=dist.ReduceOp.MIN)
        *finite, agreed = flags.tolist()
        self.wait_seconds += time.perf_counter() - started
        if not all(finite):
            raise NotFinite.of_all(*self.unseen[finite.index(0.0)])
        self.unseen.clear()
        return bool(agreed)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the loss also how spread the visual tokens' selection is over the last batch's first scan."""
        if self.unseen:
            self.look()
        self.state.epoch = self.state.global_step * self.epochs_a_step  # type: ignore[attr-defined]  # HF: of max_steps
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        if "loss" in logs and hasattr(model, "selection_metrics") and not self.args.fsdp:  # type: ignore[attr-defined]
            logs |= model.selection_metrics(**self._prepare_inputs(self.first_scan))  # type: ignore[attr-defined]
        if "learning_rate" in logs:
            logs |= groups.logged(self.optimizer)  # type: ignore[attr-defined]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class NotFinite(Exception):
    """The first loss that is not finite, and the cases of the workers that have one."""

    def __init__(self, cases: list[str], loss: float) -> None:
        super().__init__(f"the loss is {loss} on cases {', '.join(cases)}")
        self.cases = cases

    @classmethod
    def of_all(cls, loss: torch.Tensor, cases: list[str]) -> NotFinite:
        """The same on every worker: the cases of those whose loss is not finite."""
        own = (float(loss), cases)
        each = [own]
        if dist.is_initialized():
            each = each * dist.get_world_size()
            dist.all_gather_object(each, own)
        wrong = [(loss, cases) for loss, cases in each if not math.isfinite(loss)]
        return cls([case for _, cases in wrong for case in cases], wrong[0][0])


class ContrastiveTrainer(Streamed, Trainer):
    """The loss sees the embeddings of all workers; the gradient flows back through the gathering.

    Logs with the loss `positives`, the pairs that counted as positive in a step.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.positives: list[torch.Tensor] = []

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output = model(**inputs, gather=gather if dist.is_initialized() else None)
        self.positives.append(output.positives)
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.positives:
            mean = torch.stack(self.positives).double().mean()
            logs["positives"] = float(mean) * self.args.gradient_accumulation_steps
            self.positives.clear()
        super().log(logs, *args, **kwargs)


def gather(local: torch.Tensor) -> torch.Tensor:
    """(n, …) of each worker → (N, …) of all, in rank order, also where the workers' n differ; differentiable."""
    size = torch.tensor([len(local)], device=local.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = int(max(sizes))
    padding = local.new_zeros((longest - len(local), *local.shape[1:]))
    parts = collective.all_gather(torch.cat([local, padding]))
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)])


class SftTrainer(Streamed, Trainer):
    """The model's own loss, averaged over the answer tokens of all workers, and that of the alignment.

    In the first `alone` steps that of the alignment is all there is, and the language model has no part in them.
    """

    alignment: float = 0
    alone: int = 0
    processor: Mu2Processor

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self.processor.save_pretrained(output_dir)  # so that an intermediate checkpoint can be read by itself

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.state.global_step < self.alone:
            output = model(**{name: value for name, value in inputs.items() if name not in OF_THE_TEXT})
            loss: Any = 0.0
        else:
            loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        if output.get("alignment") is not None:
            loss = loss + self.alignment * output["alignment"] / self.args.gradient_accumulation_steps
        return (loss, output) if return_outputs else loss
