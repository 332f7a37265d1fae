r"""The language model learns to write the report (Ray Train).

    mu2llm submit sft --address http://HEAD:8265 --preset paper \
        --data s3://BUCKET/shards --init s3://BUCKET/contrastive --out s3://BUCKET/sft
    ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/sft.py --preset llama3-1b \
        --data s3://BUCKET/shards --init s3://BUCKET/contrastive --out s3://BUCKET/sft --set sft.workers=2

Submitted again with the same --out, it goes on where it was, or says that it is done.
"""

from mu2llm.cluster import job

main = job.training("sft")

if __name__ == "__main__":
    job.run(main)
