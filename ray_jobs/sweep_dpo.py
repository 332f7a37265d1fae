r"""Search for better values of DPO's configuration: beta, loss, learning rate, pairs (Ray Tune).

    mu2llm submit sweep_dpo --address http://HEAD:8265 --preset llama3-1b --set sweep.trials=24 \
        --data s3://BUCKET/preferences --init s3://BUCKET/sft --out s3://BUCKET/sweeps/dpo
    ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/sweep_dpo.py --preset llama3-1b \
        --data s3://BUCKET/preferences --init s3://BUCKET/sft --out s3://BUCKET/sweeps/dpo --resume

--resume goes on with the sweep that lies in --out.
"""

from typing import Annotated

import typer

from mu2llm.cluster import job


def main(
    data: job.Data,
    out: job.Out,
    init: job.OptionalInit = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep that lies in --out.")] = False,
    preset: job.Preset = "sweep",
    set_: job.Set = [],  # noqa: B006
) -> None:
    from mu2llm.sweeps import sweep

    with job.started("sweep_dpo", preset, set_, reads=[data, init], writes=[out]) as (experiment, lines):
        job.show(sweep.run(sweep.plan("dpo", data, init, out, experiment), resume, lines))


if __name__ == "__main__":
    job.run(main)
