r"""A split's reports by a checkpoint, scored and audited (Ray Data); into the tracking store too.

    mu2llm submit evaluate --address http://HEAD:8265 --preset paper \
        --checkpoint s3://BUCKET/dpo --data s3://BUCKET/shards --out s3://BUCKET/evaluation
    ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/evaluate.py --preset llama3-1b \
        --checkpoint s3://BUCKET/dpo --data s3://BUCKET/shards --out s3://BUCKET/evaluation --split validation

`--checkpoint registry://mu2llm@champion` is what the registry's alias names now.
"""

from datetime import UTC, datetime
from typing import Annotated

import typer

from mu2llm.cluster import job


def main(
    checkpoint: job.CheckpointUri,
    data: job.Data,
    out: job.Out,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    dated: Annotated[bool, typer.Option("--dated", help="Into a folder of today's date below --out.")] = False,
    fresh: job.Fresh = False,
    preset: job.Preset = "demo",
    set_: job.Set = [],  # noqa: B006
) -> None:
    from mu2llm import storage
    from mu2llm.evaluation.evaluate import evaluate

    out = storage.join(out, datetime.now(UTC).date().isoformat()) if dated else out
    with job.started("evaluate", preset, set_, reads=[checkpoint, data], writes=[out]) as (experiment, lines):
        job.show(evaluate(checkpoint, data, out, experiment, split, lines.counting("evaluate"), fresh))


if __name__ == "__main__":
    job.run(main)
