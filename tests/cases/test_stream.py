"""The global order and its shares by arithmetic alone, then streams of shards on Ray Data."""

import itertools
import time

import numpy as np
import pytest
import ray.data
import small_scans as scans
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import case, write_shards

from mu2llm import cases, config
from mu2llm.cases import stream as reading
from mu2llm.cases.stream import Order, ReadBlocks, Stream, WorkerRows, permutation
from mu2llm.errors import UserError

COUNT = 23


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 40),
    seed=st.integers(0, 9),
    run_length=st.integers(1, 5),
    batch=st.integers(1, 12),
    start=st.integers(0, 60),
    length=st.integers(0, 60),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_any_number_of_workers_sees_the_same_global_batches(count, seed, run_length, batch, start, length, worlds):
    order = Order(count, seed, run_length)
    wanted = order.items(np.arange(start, start + length))
    for world in worlds:
        if batch < world:
            continue
        shares = [WorkerRows(start, start + length, batch, rank, world) for rank in range(world)]
        positions = [share.positions(0, len(share)) for share in shares]
        steps = [
            np.concatenate([part[(part - start) // batch == step] for part in positions])
            for step in range(-(-length // batch))
        ]
        assert order.items(np.concatenate([[], *steps]).astype(int)).tolist() == wanted.tolist()
        for share, part in zip(shares, positions, strict=True):
            cut = len(part) // 2
            assert np.concatenate([share.positions(0, cut), share.positions(cut, len(part))]).tolist() == part.tolist()
            full = np.bincount((part - start) // batch)[: length // batch]
            assert (full == share.local_batch).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(0, 5), st.integers(1, 7), st.integers(0, 3))
def test_an_epoch_has_every_row_once_and_runs_stay_together(count, seed, run_length, epoch):
    order = permutation(count, seed, epoch, run_length)
    assert sorted(order.tolist()) == list(range(count))
    starts = np.flatnonzero(order % run_length == 0)
    for start in starts:
        run = order[start : start + run_length]
        run = run[run // run_length == run[0] // run_length]
        assert run.tolist() == list(range(run[0], run[0] + len(run)))
    assert permutation(count, None, epoch, run_length).tolist() == list(range(count))


def test_epochs_and_seeds_differ_and_repeat():
    orders = {(seed, epoch): tuple(permutation(50, seed, epoch, 1)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    permutation.cache_clear()
    assert tuple(permutation(50, 1, 1, 1)) == orders[1, 1]


@pytest.fixture(scope="module")
def shards(ray_cluster, tmp_path_factory):
    """A derived table of COUNT rows in several files, without scans."""
    folder = tmp_path_factory.mktemp("stream")
    rng = np.random.default_rng(0)
    features = rng.normal(size=(COUNT, 3, 5)).astype(np.float16)
    items = [scans.case(number) for number in range(COUNT)]
    parent = scans.finished(str(folder / "parent"), items)
    batches = [
        {
            "id": [c.id for c in items[a : a + 6]],
            "report": [c.report for c in items[a : a + 6]],
            "x": features[a : a + 6],
        }
        for a in range(0, COUNT, 6)
    ]
    made = scans.derived(str(folder / "features"), parent, batches)
    made.truth = features
    return made


def stream(shards, **more):
    return cases.Stream(shards, "train", ["id", "x"], **{"batch_size": 4, "seed": 0, **more})


def test_a_stream_gives_the_rows_of_its_order(shards):
    batches = stream(shards, rows=2 * COUNT + 1)
    got = list(batches)
    assert len(got) == len(batches) == 12 and [len(batch["id"]) for batch in got] == [4] * 11 + [3]
    items = np.concatenate([batch["item"] for batch in got])
    np.testing.assert_array_equal(items, Order(COUNT, 0).items(np.arange(2 * COUNT + 1)))
    np.testing.assert_array_equal(np.concatenate([batch["row"] for batch in got]), np.arange(2 * COUNT + 1))
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in got]), shards.truth[items])
    assert list(itertools.chain(*(batch["id"] for batch in got))) == [f"case-{item:03d}" for item in items]
    assert got[0]["x"].flags.writeable and batches.wait_seconds > 0


@pytest.mark.slow
def test_reading_ahead_leaves_the_interpreter_to_who_consumes(ray_cluster, tmp_path):
    """Ray Data's scheduler turned in the training process without a pause whenever the readers were ahead."""
    experiment = config.load("demo")  # of rows so large that the readers come to the end of their room
    large = write_shards(str(tmp_path), [case(i) for i in range(24)], "train", experiment)
    options = {"batch_size": 8, "seed": 0, "rank": 0, "world": 1, "start_row": 0, "rows": 200_000}
    batches = iter(Stream(large, "train", ["id", "voxels"], **options))
    next(batches)
    assert max(share_of_a_core(2) for _ in range(8)) < 0.5


def share_of_a_core(seconds):
    """Of this process, while it does nothing."""
    before = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - before) / seconds


def test_it_goes_on_at_any_row_on_another_number_of_workers(shards):
    whole = np.concatenate([batch["item"] for batch in stream(shards, rows=2 * COUNT)])
    parts = [list(stream(shards, rows=2 * COUNT, start_row=8, rank=rank, world=2)) for rank in range(2)]
    joined = np.concatenate([part["item"] for pair in zip(*parts, strict=True) for part in pair])
    np.testing.assert_array_equal(joined, whole[8:])


def test_ids_may_name_a_case_several_times(shards):
    ids = ["case-003", "case-001", "case-003", "case-022"]
    got = list(stream(shards, ids=ids, rows=8, seed=5))
    items = np.concatenate([batch["item"] for batch in got])
    assert sorted(items[:4]) == [0, 1, 2, 3] and sorted(items[4:]) == [0, 1, 2, 3]
    assert list(itertools.chain(*(batch["id"] for batch in got))) == [ids[item] for item in items]
    rows = cases.dataset(shards, "train", ["id", "x"], ids=ids).take_all()
    assert [row["id"] for row in rows] == ids and [row["item"] for row in rows] == [0, 1, 2, 3]


def test_without_a_seed_all_rows_come_once_as_stored(shards):
    got = list(stream(shards, seed=None, batch_size=10))
    assert [len(batch["id"]) for batch in got] == [10, 10, 3]
    assert list(itertools.chain(*(batch["id"] for batch in got))) == [f"case-{n:03d}" for n in range(COUNT)]


def test_nothing_left_is_an_empty_stream(shards):
    assert list(stream(shards, rows=8, start_row=8)) == [] and len(stream(shards, rows=8, start_row=8)) == 0


def test_a_stream_may_be_left_early_and_begun_again(shards):
    batches = stream(shards, rows=10 * COUNT)
    first = next(iter(batches))["item"].tolist()
    for batch in batches:
        assert batch["item"].tolist() == first
        break


def test_streams_leave_ray_datas_settings_alone(shards):
    before = ray.data.DataContext.get_current().target_max_block_size
    stream(shards)
    context = ray.data.DataContext.get_current()
    assert context.target_max_block_size == before and not context.execution_options.preserve_order
    assert context.execution_options.is_resource_limits_default()


def test_readers_and_their_room_are_of_the_cluster_and_of_the_batch(monkeypatch):
    """Two tasks read for 64 GPUs, and each worker's stream counted half of the cluster's object store as its own."""
    gib = 2**30

    def cluster(**resources):
        monkeypatch.setattr(reading.ray, "cluster_resources", lambda: resources)

    cluster(CPU=8 * 192, object_store_memory=8 * 128 * gib)
    assert [reading.reading_tasks(workers) for workers in (1, 8, 64)] == [192, 24, 3]
    row = 48 * 2**20
    assert reading.room_ahead(4 * row, row, 3, 64) == (8 * 4 + 8 * 3) * row
    assert reading.room_ahead(64 * row, row, 24, 64) == 8 * gib
    cluster(CPU=4.0, object_store_memory=gib)
    assert reading.reading_tasks() == 2 and reading.room_ahead(4 * row, row, 2, 2) == gib / 4
    cluster()
    assert reading.reading_tasks(8) == 2


def test_large_rows_are_fetched_together_and_given_one_by_one():
    """A reading task fetched one row after the other where a row is as large as a block."""
    asked = []

    class Rows:
        def read(self, items):
            asked.append(len(items))
            return {"x": items}

    own, order = WorkerRows(0, 13, 2), Order(13, 0)
    read = ReadBlocks(Rows(), order, own, block_rows=1, together=4)
    given = list(read({"first": np.array([1]), "end": np.array([10])}))
    assert asked == [4, 4, 1] and [len(block["x"]) for block in given] == [1] * 9
    assert np.concatenate([block["x"] for block in given]).tolist() == order.items(np.arange(1, 10)).tolist()


def test_a_dataset_has_every_row_in_order_for_map_batches(shards):
    means = cases.dataset(shards, "train", ["id", "x"]).map_batches(
        lambda batch: {"id": batch["id"], "mean": batch["x"].astype(np.float32).mean((1, 2))}, batch_format="numpy"
    )
    rows = means.take_all()
    assert [row["id"] for row in rows] == [f"case-{n:03d}" for n in range(COUNT)]
    np.testing.assert_allclose([row["mean"] for row in rows], shards.truth.astype(np.float32).mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"world": 5, "batch_size": 4}, "cannot be shared by 5 workers"),
        ({"ids": ["case-000", "nobody"]}, "1 cases are not in split 'train', such as nobody"),
    ],
)
def test_what_cannot_be_streamed_is_a_user_error(shards, more, says):
    with pytest.raises(UserError, match=says):
        stream(shards, **more)


def test_columns_and_splits_that_are_not_there_are_user_errors(shards):
    with pytest.raises(UserError, match="no column voxels; there are id, report, x"):
        cases.Stream(shards, "train", ["voxels"], 4, 0)
    with pytest.raises(UserError, match="no rows in split 'test'; there are train"):
        cases.Stream(shards, "test", ["x"], 4, 0)


def test_batches_of_alike_lengths_pad_little_and_hold_every_item_once():
    lengths = np.random.default_rng(0).integers(10, 200, 500)
    plain, grouped = Order(500, seed=1), Order(500, seed=1, lengths=lengths, batch_size=10)

    def padded(order, epoch=0):
        batches = lengths[order.epoch(epoch)].reshape(-1, 10)
        return (batches.max(1, keepdims=True) - batches).sum()

    assert sorted(grouped.epoch(0)) == list(range(500))
    assert padded(grouped) < 0.2 * padded(plain)
    assert not np.array_equal(grouped.epoch(0), grouped.epoch(1))
    assert np.array_equal(grouped.items(np.arange(500, 1000)), grouped.epoch(1))
    means = lengths[grouped.epoch(0)].reshape(-1, 10).mean(1)
    assert abs(np.corrcoef(np.arange(50), means)[0, 1]) < 0.5  # neither short ones first nor long ones
