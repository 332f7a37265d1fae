r"""The language model learns to write the report (Ray Train).

    mu2llm submit sft --address http://HEAD:8265 --preset paper \
        --data s3://BUCKET/shards --init s3://BUCKET/contrastive --out s3://BUCKET/sft
    ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/sft.py --preset llama3-1b \
        --data s3://BUCKET/shards --init s3://BUCKET/contrastive --out s3://BUCKET/sft --set sft.workers=2

Submitted again with the same --out, it goes on where it was, or says that it is done.
"""

from mu2llm.cluster import job


def main(
    data: job.Data,
    out: job.Out,
    init: job.OptionalInit = None,
    preset: job.Preset = "demo",
    set_: job.Set = [],  # noqa: B006
) -> None:
    from mu2llm.stages import sft

    with job.started("sft", preset, set_, reads=[data, init], writes=[out]) as (experiment, lines):
        checkpoint = sft.run(data, out, experiment, init, lines.training("sft"))
        job.show({"checkpoint": out, **checkpoint.training.model_dump(exclude={"history"})})


if __name__ == "__main__":
    job.run(main)
