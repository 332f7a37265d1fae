r"""Candidates → judgements → preference pairs (Ray Data).

    mu2llm submit preferences --address http://HEAD:8265 --preset paper \
        --checkpoint s3://BUCKET/sft --data s3://BUCKET/shards --out s3://BUCKET/preferences
    ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/preferences.py --preset llama3-1b \
        --checkpoint s3://BUCKET/sft --data s3://BUCKET/shards --out s3://BUCKET/preferences
"""

from mu2llm.cluster import job


def main(
    checkpoint: job.CheckpointUri,
    data: job.Data,
    out: job.Out,
    preset: job.Preset = "demo",
    set_: job.Set = [],  # noqa: B006
) -> None:
    from mu2llm.stages.preferences import prefer

    with job.started("preferences", preset, set_, reads=[checkpoint, data], writes=[out]) as (experiment, lines):
        job.show(prefer(checkpoint, data, out, experiment, progress=lines.counting("preferences")))


if __name__ == "__main__":
    job.run(main)
