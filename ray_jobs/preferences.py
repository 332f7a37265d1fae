r"""Candidates → judgements → preference pairs (Ray Data).

    mu2llm submit preferences --address http://HEAD:8265 --preset paper \
        --checkpoint s3://BUCKET/sft --data s3://BUCKET/shards --out s3://BUCKET/preferences
    ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/preferences.py --preset llama3-1b \
        --checkpoint s3://BUCKET/sft --data s3://BUCKET/shards --out s3://BUCKET/preferences
"""

from typing import Annotated

import typer

from mu2llm.cluster import job


def main(
    checkpoint: job.CheckpointUri,
    data: job.Data,
    out: job.Out,
    corrections: Annotated[str | None, typer.Option(help="URI of radiologists' corrections, pairs too.")] = None,
    fresh: job.Fresh = False,
    preset: job.Preset = "demo",
    set_: job.Set = [],  # noqa: B006
) -> None:
    from mu2llm.stages.preferences import prefer

    reads = [checkpoint, data, corrections]
    with job.started("preferences", preset, set_, reads=reads, writes=[out]) as (experiment, lines):
        progress = lines.counting("preferences")
        job.show(prefer(checkpoint, data, out, experiment, progress=progress, corrections=corrections, fresh=fresh))


if __name__ == "__main__":
    job.run(main)
