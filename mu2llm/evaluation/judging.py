"""Judging on Ray Data: an `hf:` model answers in a pool of actors that hold what they declare; the rules judge in tasks
where there is much to judge. An endpoint is asked by threads of this process, `judge.concurrency` at a time.

The cache is looked up before, so that only what nobody has judged gets to the stage, and keeps judgements as they come.
Where no Ray is joined, as in `mu2llm score`, the model is loaded into this process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from mu2llm import green, logs, private_apis
from mu2llm.engine.actors import actor_pool, failures
from mu2llm.green import Judge, measures
from mu2llm.green.judge import Pair
from mu2llm.green.prompted import Unanswered
from mu2llm.records import Judgement
from mu2llm.settings.green import JudgeConfig

MANY = 20_000  # pairs, from which the rules take longer than Ray Data's tasks take to start
PAIRS_A_TASK = 1000


def load_judge(config: JudgeConfig) -> Judge:
    """The judge that is named, spread over the cluster that is joined."""
    if not ray.is_initialized():
        return green.load_judge(config)
    return Rules() if config.name == "rules" else green.load_judge(config, ActorWriter)


class Ahead:
    """A judge that has judged some pairs already, in one go: each stage on Ray loads the model anew."""

    def __init__(self, judge: Judge, pairs: Sequence[Pair]) -> None:
        self._judge = judge
        wanted = list(dict.fromkeys(pairs))
        self._known = dict(zip(wanted, judge.judge(wanted), strict=True)) if wanted else {}
        self.identity, self.measures = judge.identity, measures(judge)

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        if new:
            self._known.update(zip(new, self._judge.judge(new), strict=True))
        return [self._known[pair] for pair in pairs]


class ActorWriter:
    """Answers of a local model, loaded by Ray Data's actors and not by this process."""

    def __init__(self, name: str, config: JudgeConfig) -> None:
        from mu2llm.green import local

        self._name, self._config = name, config
        self.identity = local.identity(name, config.max_new_tokens)

    def answers(self, prompts: list[str]) -> Iterator[tuple[int, str | Unanswered]]:
        """Longest prompts first, so that a batch holds little padding."""
        config, gpus = self._config, _gpus(self._config)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        batches = -(-len(prompts) // config.batch_size)
        # from_items makes its blocks here; from_arrow asks a task for them, which waits for ever where no CPU is free
        rows = ray.data.from_items([{"number": i, "prompt": prompts[i]} for i in order], override_num_blocks=batches)
        rows.context.raise_original_map_exception = True
        answered = rows.map_batches(
            LocalModel,
            fn_constructor_args=(self._name, config, gpus > 0),
            batch_size=config.batch_size,
            batch_format="numpy",
            compute=actor_pool(config.actors, batches),
            num_cpus=config.cpus_per_actor,
            num_gpus=gpus,
        )
        mend = "judgements so far are kept in judge.cache (out of memory: lower judge.batch_size)"
        with failures(f"judging by hf:{self._name}", mend):
            for row in answered.iter_rows():
                yield int(row["number"]), Unanswered(row["why"]) if row["why"] else str(row["answer"])


class LocalModel:
    """The actor: prompts → answers."""

    def __init__(self, name: str, config: JudgeConfig, gpu: bool) -> None:
        if not gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves those in sight that it has given to others
        import torch

        from mu2llm.green.local import LocalWriter

        logs.begin(stage="judge")
        torch.set_num_threads(max(1, int(config.cpus_per_actor)))
        self._writer = LocalWriter(name, config.batch_size, config.max_new_tokens)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        numbers, answers = zip(*self._writer.answers(batch["prompt"].tolist()), strict=True)
        unanswered = [isinstance(answer, Unanswered) for answer in answers]
        return {
            "number": batch["number"][list(numbers)],
            "answer": ["" if none else answer for answer, none in zip(answers, unanswered, strict=True)],
            "why": [answer.why if isinstance(answer, Unanswered) else "" for answer in answers],
        }


def _gpus(config: JudgeConfig) -> float:
    """GPUs of an actor: as configured, else one where the cluster has any or may add some."""
    if config.gpus_per_actor is not None:
        return config.gpus_per_actor
    return float(bool(ray.cluster_resources().get("GPU") or private_apis.largest_resources().get("GPU")))


class Rules:
    """The rules judge, in tasks where there is much to judge."""

    def __init__(self) -> None:
        self._rules = green.load_judge(JudgeConfig())
        self.identity = self._rules.identity

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        if len(pairs) < MANY:
            return self._rules.judge(pairs)
        rows = [{"number": number, "reference": pair[0], "candidate": pair[1]} for number, pair in enumerate(pairs)]
        tasks = ray.data.from_items(rows, override_num_blocks=-(-len(pairs) // PAIRS_A_TASK))
        judged = tasks.map_batches(_by_rules, batch_size=None, batch_format="pyarrow", num_cpus=1)
        found: dict[int, Judgement] = {}
        with failures("judging by rules", "run the same command again"):
            for row in judged.iter_rows():
                found[row.pop("number")] = Judgement.from_row(row)
        return [found[number] for number in range(len(pairs))]


def _by_rules(rows: pa.Table) -> pa.Table:
    pairs = list(zip(rows["reference"].to_pylist(), rows["candidate"].to_pylist(), strict=True))
    judged = Judgement.table(green.load_judge(JudgeConfig()).judge(pairs))
    return judged.append_column("number", rows["number"])
