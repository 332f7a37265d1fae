r"""The SFT model learns to prefer what the judge preferred (Ray Train).

    mu2llm submit dpo --address http://HEAD:8265 --preset paper \
        --data s3://BUCKET/preferences --init s3://BUCKET/sft --out s3://BUCKET/dpo
    ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/dpo.py --preset llama3-1b \
        --data s3://BUCKET/preferences --init s3://BUCKET/sft --out s3://BUCKET/dpo --set dpo.workers=2

Submitted again with the same --out, it goes on where it was, or says that it is done.
"""

from mu2llm.cluster import job

main = job.training("dpo")

if __name__ == "__main__":
    job.run(main)
