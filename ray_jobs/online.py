r"""Rounds of candidates of the current policy → preference pairs → DPO (Ray Data, Ray Train).

    mu2llm submit online --address http://HEAD:8265 --preset paper --rounds 3 \
        --checkpoint s3://BUCKET/sft --data s3://BUCKET/shards --out s3://BUCKET/online
    ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/online.py --preset llama3-1b \
        --checkpoint s3://BUCKET/sft --data s3://BUCKET/shards --out s3://BUCKET/online

Submitted again with the same --out, it goes on in the round where it was.
"""

from typing import Annotated

import typer

from mu2llm.cluster import job


def main(
    checkpoint: job.CheckpointUri,
    data: job.Data,
    out: job.Out,
    rounds: Annotated[int, typer.Option(help="At most so many.")] = 2,
    fresh: job.Fresh = False,
    preset: job.Preset = "demo",
    set_: job.Set = [],  # noqa: B006
) -> None:
    from mu2llm.stages.online import run

    with job.started("online", preset, set_, reads=[checkpoint, data], writes=[out]) as (experiment, lines):
        job.show(run(checkpoint, data, out, experiment, rounds, lines, fresh))


if __name__ == "__main__":
    job.run(main)
