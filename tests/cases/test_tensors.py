"""Tensors in Parquet come back as they were."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_scans as scans
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mu2llm.cases import shards, tensors
from mu2llm.cases.shards import read_rows

ARRAYS = st.sampled_from(["uint8", "bool", "float16", "float32", "int16", "int64"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=4, max_side=4))
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ARRAYS)
def test_any_tensor_survives_parquet(array):
    batch = {"id": [str(n) for n in range(len(array))], "x": array}
    schema = tensors.schema_of(batch)
    stored = io.BytesIO()
    pq.write_table(pa.Table.from_batches([tensors.encode(batch, schema)]), stored)
    table = pq.read_table(stored)
    back = tensors.decode(table, table.schema)
    assert back["x"].dtype == array.dtype
    np.testing.assert_array_equal(back["x"], array)
    assert back["id"].tolist() == batch["id"]


def test_slices_and_several_chunks_come_back_too():
    array = np.arange(24, dtype=np.int16).reshape(6, 4)
    schema = tensors.schema_of({"x": array})
    table = pa.Table.from_batches([tensors.encode({"x": array}, schema)])
    parts = pa.concat_tables([table.slice(4, 2), table.slice(1, 2)])
    np.testing.assert_array_equal(tensors.decode(parts, schema)["x"], array[[4, 5, 1, 2]])


def test_a_row_of_another_shape_is_refused():
    schema = pa.schema([tensors.tensor_field("x", (2, 2), "uint8")])
    with pytest.raises(ValueError, match=r"\(3, 3\), expected \(2, 2\)"):
        tensors.encode({"x": np.zeros((1, 3, 3), np.uint8)}, schema)


def test_rows_of_object_storage_are_fetched_at_once(tmp_path, monkeypatch):
    """They came one after the other, over one connection each."""
    items = [scans.case(number) for number in range(12)]
    row = np.arange(2**16, dtype=np.float32)

    def batch(numbers):
        return {"id": [items[n].id for n in numbers], "x": np.stack([row + np.float32(n) for n in numbers])}

    batches = [batch(range(a, a + 4)) for a in (0, 4, 8)]
    made = scans.derived(str(tmp_path / "x"), scans.finished(str(tmp_path / "parent"), items), batches)
    wanted, waiting = np.array([0, 11, 5, 6, 0, 3]), threading.Barrier(6)

    def read_groups(*what):
        waiting.wait(30)  # for all six
        return fetch(*what)

    fetch = shards._read_groups
    monkeypatch.setattr(shards, "_read_groups", read_groups)
    monkeypatch.setattr(shards.storage, "is_remote", lambda uri: True)
    read = read_rows(made.files("train"), made.rows("train"), ["id", "x"], wanted)
    assert read["x"][:, 0].tolist() == wanted.tolist() and read["id"].tolist() == [items[n].id for n in wanted]


def test_threads_read_one_file_at_the_same_time(tmp_path):
    """One reader for all crashed, or waited for ever for a buffer that another thread had replaced."""
    items = [scans.case(number) for number in range(24)]
    rows = np.arange(24, dtype=np.float32)[:, None].repeat(64, 1)
    made = scans.derived(
        str(tmp_path / "x"),
        scans.finished(str(tmp_path / "parent"), items),
        [{"id": [each.id for each in items], "x": rows}],
    )

    def read(first):
        wanted = np.arange(first, first + 3)
        got = read_rows(made.files("train"), made.rows("train"), ["id", "x"], wanted)
        return got["x"][:, 0].tolist() == wanted.tolist()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, np.random.default_rng(0).integers(0, 21, 2000)))
