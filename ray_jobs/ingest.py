r"""Manifest and volumes → shards (Ray Data).

    mu2llm submit ingest --address http://HEAD:8265 --preset paper --format ct-rate \
        --manifest s3://BUCKET/ct-rate --volumes s3://BUCKET/ct-rate --out s3://BUCKET/shards
    ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/ingest.py --preset paper \
        --manifest s3://BUCKET/cases.jsonl --volumes s3://BUCKET/scans --out s3://BUCKET/shards
"""

from mu2llm.cluster import job


def main(
    manifest: job.Manifest,
    volumes: job.Volumes,
    out: job.Out,
    format: job.Format = "jsonl",
    preset: job.Preset = "demo",
    set_: job.Set = [],  # noqa: B006
) -> None:
    from mu2llm import cases

    with job.started("ingest", preset, set_, reads=[manifest, volumes], writes=[out]) as (experiment, lines):
        table = cases.read_manifest(manifest, format, volumes, experiment.data)
        job.show(cases.ingest(table, out, experiment, lines.counting("ingest")))


if __name__ == "__main__":
    job.run(main)
