"""DPO stage: the SFT model learns to prefer what the judge preferred.

trl's `DPOTrainer` with three changes: the batches come from the stream; each scan is encoded once and serves
chosen and rejected alike, policy and reference seeing the very same view; and the reference log-probabilities
are computed once, in a Ray Data pass, so that no second model is held. All of trl's losses stay.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from trl import DPOConfig as TrlDpoConfig

from mu2llm import storage
from mu2llm.artefacts import Identity, open_checkpoint
from mu2llm.cases import Shards, dataset
from mu2llm.cases.shards import Joined
from mu2llm.config import Experiment
from mu2llm.engine import loading
from mu2llm.engine.actors import failures, on_actors, use_cpus
from mu2llm.engine.features import encode_scans
from mu2llm.engine.log_probabilities import sequence_logps
from mu2llm.errors import UserError
from mu2llm.model import (
    Mu2ForConditionalGeneration,
    Mu2Processor,
    add_lora,
    load,
    load_lora,
    load_processor,
    merge_lora,
)
from mu2llm.progress import Logged
from mu2llm.records import Checkpoint, PreferencePair
from mu2llm.settings.inference import InferenceConfig
from mu2llm.settings.stages import DpoConfig
from mu2llm.stages import launch, lengths, placement
from mu2llm.stages.dpo_step import Examples, Mu2DPOTrainer, loss_arguments
from mu2llm.stages.job import Job, Watch, finished, new_job
from mu2llm.stages.launch import scan_by_scan
from mu2llm.stages.preferences import Preferences, content, read_pairs
from mu2llm.stages.trainer import arguments, train
from mu2llm.stages.training_scans import carry, remember
from mu2llm.stages.validation import Validation
from mu2llm.stages.worker import Batches, Resume

PAIRS = 8  # that the reference takes at a time


def run(
    data: str,
    out: str,
    experiment: Experiment,
    init: str | None = None,
    progress: Logged | None = None,
    watch: Watch | None = None,
    fresh: bool = False,
) -> Checkpoint:
    """Trains on the pairs that `prefer` wrote at `data`, from `init` (default: the checkpoint that wrote them).

    Run again it goes on, or gives what is done; `fresh` removes what is at `out` and starts over.
    """
    job = job_of(data, out, experiment, init, watch=watch, fresh=fresh)
    done = finished(job)
    if done:
        return done
    pairs = read_pairs(job.data)
    assert job.parent
    check_lengths(pairs, load_processor(job.parent))
    placement.check(job)
    return launch.run(prepared(job, pairs, progress), loop, progress)


def job_of(data: str, out: str, experiment: Experiment, init: str | None = None, **more: Any) -> Job:
    """What `run` does, as plain values; a UserError where its inputs do not fit together."""
    data = storage.absolute(data)
    preferences, pairs = Preferences.open(data), read_pairs(data)
    init = init or preferences.checkpoint
    shards = preferences.scans()
    check(preferences, shards, pairs, init)
    more |= {"data": data, "data_checksum": content(pairs, shards), "rows": len(pairs)}
    more |= {"judge": preferences.judge, "split": preferences.split, "corrected": preferences.corrected}
    return new_job("dpo", shards, out, experiment, init, **more).model_copy(update={"shards": shards.uri})


def prepared(job: Job, pairs: list[PreferencePair], progress: Logged | None = None) -> Job:
    """The job with what is computed once for all jobs on these pairs from this parent: features, log-probabilities."""
    if job.resolved.dpo.freeze_vision:
        encoded = {"features": _encoded(job, job.shards, progress)}
        encoded |= {"corrected": _encoded(job, job.corrected, progress)} if job.corrected else {}
        job = job.model_copy(update=encoded)
    return job.model_copy(update={"reference": reference_logps(job, pairs)})


def _encoded(job: Job, shards: str, progress: Logged | None) -> str:
    """URI of the features of shards through the parent's vision."""
    assert job.parent
    return encode_scans(job.parent, Shards.open(shards), job.resolved.dpo.inference(), scan_by_scan(progress)).uri


def scans_of(job: Job) -> tuple[Shards, str]:
    """What the pairs are about, and the column of it that is read."""
    shards = Shards.open(job.features or job.shards)
    scans = Joined(shards, Shards.open(job.corrected)) if job.corrected else shards
    return scans, "features" if job.features else "voxels"


def check(preferences: Preferences, shards: Shards, pairs: list[PreferencePair], init: str) -> None:
    """Refuses pairs without rows, of other shards, or of cases that are not there; another spec or architecture."""
    checkpoint = open_checkpoint(init)
    if checkpoint.lineage.stage == "contrastive":
        raise UserError(f"{init} is a contrastive checkpoint and writes no reports; start dpo from an sft checkpoint")
    if checkpoint.lineage.spec_hash != preferences.spec_hash:
        raise UserError(
            f"{init} expects spec {checkpoint.lineage.spec_hash}, the pairs were made on {preferences.spec_hash}: "
            "start from the checkpoint that wrote their candidates"
        )
    if shards.checksum != preferences.data_checksum:
        raise UserError(f"{shards.uri} has changed since the pairs were made; run mu2llm prefer again")
    known = {case.id for case in shards.cases(preferences.split)}
    missing = sorted({pair.case_id for pair in pairs} - known)
    if missing:
        raise UserError(
            f"{len(missing)} cases of the pairs are not in {shards.uri} ({preferences.split}), such as {missing[0]}; "
            "run mu2llm prefer again"
        )


def check_lengths(pairs: list[PreferencePair], processor: Mu2Processor) -> None:
    """A UserError names the cases of pairs whose texts are longer than the model takes beside the scan."""
    asked: dict[str, list[tuple[str, str]]] = {}
    for pair in pairs:
        asked.setdefault(pair.case_id, []).extend([(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)])
    found = lengths.too_long(processor, asked)
    if found:
        named = ", ".join(f"{name} ({tokens} tokens)" for name, tokens in list(found.items())[: lengths.NAMED])
        raise UserError(
            f"pairs of {len(found)} cases are longer than the {processor.max_text_tokens} tokens that the model takes "
            f"beside the scan, such as {named}; leave them out of the corrections, or train with a larger "
            "model.max_text_tokens"
        )


def loop(job: Job, resume: Resume) -> None:
    """One worker: the policy, the stream of pairs with their scans, the training, the merged checkpoint."""
    experiment, settings = job.resolved, job.resolved.dpo
    assert job.parent and job.reference
    shards, scan = scans_of(job)
    model: Any
    model, processor = load(job.parent, torch.float32)
    prepare(model, settings)
    if experiment.model.lora:
        model = add_lora(model, experiment.model.lora)
    reader = copy.deepcopy(processor)  # for the thread that reads ahead
    examples = Examples(read_pairs(job.data), read_reference(job.reference), reader)
    batches = Batches(
        job, resume, shards, ["id", "chunk_mask", scan], lambda rows: examples.collate(rows, scan),
        ids=[pair.case_id for pair in examples.pairs],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = Mu2DPOTrainer(
            model=model,
            args=TrlDpoConfig(**arguments(job, folder, model, **loss_arguments(settings))),
            train_dataset=datasets.Dataset.from_list([{"prompt": "", "chosen": "", "rejected": ""}]),
            data_collator=examples.collator,
            processing_class=processor.tokenizer,
        )
        trainer.batches, trainer.prompt_hash = batches, processor.prompt_hash
        if job.watch:
            held_out = Shards.open(job.features or job.shards)  # without what was corrected
            trainer.add_callback(Validation(job, trainer, processor, held_out))

        def finish(trained: Any, target: str) -> dict[str, float]:
            merged = merge_lora(trained)
            merged.save_pretrained(target)
            processor.save_pretrained(target)
            if settings.freeze_vision:
                carry(str(job.parent), target)
            else:
                remember(merged, job, shards, target)
            return {}

        train(trainer, job, resume, finish, lambda saved: restore(job, saved))


def prepare(model: Mu2ForConditionalGeneration, settings: DpoConfig) -> None:
    """The parent as a policy, which starts as its reference: in training mode its numbers are the same."""
    model.freeze_statistics()
    if settings.freeze_vision:
        model.freeze_vision()


def restore(job: Job, folder: str) -> Mu2ForConditionalGeneration:
    """The model that HF's trainer saved, LoRA merged."""
    if not job.resolved.model.lora:
        return Mu2ForConditionalGeneration.from_pretrained(folder).eval()
    assert job.parent
    return merge_lora(load_lora(load(job.parent, torch.float32)[0], folder))


# ---- the reference's log-probabilities, once for all epochs, betas and losses


def reference_logps(job: Job, pairs: list[PreferencePair]) -> str:
    """URI of the pairs' reference log-probabilities under the parent, computed unless they are there.

    They lie beside the pairs, one row a pair, which the row names; the file is named by the parent's weights and
    prompt, the scans, the precision (the policy's own: rewards start at 0), and `ld_alpha`, which weighs tokens.
    """
    settings = job.resolved.dpo
    assert job.parent
    inputs: dict[str, Any] = {"parent": job.parent_weights, "data": Shards.open(job.shards).checksum}
    inputs |= {"prompt": prompt} if (prompt := open_checkpoint(job.parent).lineage.prompt) else {}
    inputs |= {} if settings.precision == "fp32" else {"precision": settings.precision}
    inputs |= {} if settings.ld_alpha is None else {"ld_alpha": settings.ld_alpha}
    uri, keys = storage.join(job.data, "reference", f"{Identity.of(inputs).digest}.parquet"), [p.key for p in pairs]
    if storage.exists(uri) and storage.read_table(uri).column("pair").to_pylist() == keys:
        return uri
    shards, scan = scans_of(job)
    rows = dataset(shards, job.split, ["id", "chunk_mask", scan], ids=[pair.case_id for pair in pairs])
    inference = settings.inference(PAIRS)
    logps = on_actors(rows, ReferenceActor, (job, pairs, scan, inference), inference, len(pairs))
    with failures("the reference's log-probabilities", "run again"):
        columns = list(logps.iter_batches(batch_size=None, batch_format="numpy"))
    table = pa.table({name: np.concatenate([part[name] for part in columns]) for name in columns[0]}).sort_by("item")
    table = table.append_column("pair", [keys])
    storage.write_table(uri, table)
    return uri


def read_reference(uri: str) -> np.ndarray:
    """(pairs, 2): log-probability of chosen and of rejected."""
    table = storage.read_table(uri)
    return np.stack([table.column("chosen").to_numpy(), table.column("rejected").to_numpy()], axis=1)


class ReferenceActor:
    """Holds the parent in a Ray Data actor: batches of pairs → their log-probabilities."""

    def __init__(self, job: Job, pairs: list[PreferencePair], scan: str, inference: InferenceConfig) -> None:
        use_cpus(inference)
        assert job.parent
        self.precision = inference.used_precision
        self.model, processor = loading.load(job.parent, self.precision, inference.used_device)
        self.examples, self.scan, self.ld_alpha = Examples(pairs, None, processor), scan, job.resolved.dpo.ld_alpha

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        batch = self.examples.collate(rows, self.scan)
        batch.pop("case_ids")
        moved = {k: v.to(self.model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        chosen, rejected = sequence_logps(self.model, moved, self.ld_alpha, self.precision).chunk(2)
        return {"item": rows["item"], "chosen": chosen.cpu().numpy(), "rejected": rejected.cpu().numpy()}
