r"""The whole way on cases of one's own: ingest, three stages, preferences, evaluation, registry; one configuration.

    mu2llm submit pipeline --address http://HEAD:8265 --preset paper --driver-cpus 2 \
        --manifest s3://BUCKET/cases.jsonl --volumes s3://BUCKET/scans --out s3://BUCKET/runs/first
    ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/pipeline.py --preset llama3-1b \
        --manifest s3://BUCKET/cases.jsonl --volumes s3://BUCKET/scans --out s3://BUCKET/runs/first

Submitted again with the same --out, it goes on at the step that is not done; a step whose configuration changed is
done again beside the old result, with what follows from it.
"""

from mu2llm.cluster import job


def main(
    manifest: job.Manifest,
    volumes: job.Volumes,
    out: job.Out,
    format: job.Format = "jsonl",
    fresh: job.Fresh = False,
    preset: job.Preset = "demo",
    set_: job.Set = [],  # noqa: B006
) -> None:
    from mu2llm import pipeline

    source = pipeline.Source(manifest, volumes, format)
    with job.started("pipeline", preset, set_, reads=[manifest, volumes], writes=[out]) as (experiment, lines):
        job.show(pipeline.run(experiment, out, source, lines, fresh=fresh))


if __name__ == "__main__":
    job.run(main)
