r"""The checks of `mu2llm doctor`, made where jobs run: rights to storage, nodes, versions, resources.

    mu2llm doctor --address http://HEAD:8265 --preset paper --reads s3://BUCKET/scans --writes s3://BUCKET/runs
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python ray_jobs/doctor.py --preset paper --reads s3://BUCKET/scans --writes s3://BUCKET/runs
"""

from typing import Annotated

import typer

from mu2llm import cluster, config
from mu2llm.cluster import doctor, job


def main(
    preset: job.Preset = "demo",
    set_: job.Set = [],  # noqa: B006
    name: Annotated[str, typer.Option("--job")] = "pipeline",
    reads: Annotated[list[str], typer.Option("--reads")] = [],  # noqa: B006
    writes: Annotated[list[str], typer.Option("--writes")] = [],  # noqa: B006
) -> None:
    with cluster.session():
        checks = doctor.examine(config.load(preset, set_), name, reads, writes)
    job.show({"checks": [check.model_dump() for check in checks]})


if __name__ == "__main__":
    job.run(main)
