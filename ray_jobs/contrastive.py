r"""Scans and what their reports say meet in one space: the vision tower (Ray Train).

    mu2llm submit contrastive --address http://HEAD:8265 --preset paper \
        --data s3://BUCKET/shards --out s3://BUCKET/contrastive
    ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/contrastive.py --preset llama3-1b \
        --data s3://BUCKET/shards --out s3://BUCKET/contrastive --set contrastive.workers=2

Submitted again with the same --out, it goes on where it was, or says that it is done.
"""

from mu2llm.cluster import job

main = job.training("contrastive")

if __name__ == "__main__":
    job.run(main)
