from small_runs import checkpoints, shards  # noqa: F401
