"""Tensors in Parquet come back as they were."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_scans as scans
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mu2llm import cases
from mu2llm.cases import tensors
from mu2llm.cases.shards import begun, read_rows

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


def test_a_derived_table_goes_on_where_a_kill_stopped_it(tmp_path):
    """Files that are whole are neither written again nor deleted; what does not continue the rows does not count."""
    items = [scans.case(number) for number in range(12)]
    parent, uri = scans.finished(str(tmp_path / "parent"), items), str(tmp_path / "features")
    row = np.arange(2**18, dtype=np.float32)  # 1 MiB

    def batches(numbers, stop=None):
        for number in numbers:
            if number == stop:
                raise RuntimeError("killed")
            yield {"id": [items[number].id], "x": row[None] + number}

    with pytest.raises(RuntimeError):
        cases.write_rows(uri, [("train", batches(range(12), stop=7))], parent, shard_mb=2)
    (tmp_path / "features" / "train" / ".00003-half.parquet.1.ab").write_bytes(b"half")
    kept = begun(uri, ["train", "test"], parent)
    assert [ids for _, ids in kept["train"]] == [[f"case-{n:03d}" for n in pair] for pair in ((0, 1), (2, 3), (4, 5))]
    assert "test" not in kept
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.parquet")}
    made = cases.write_rows(uri, [("train", batches(range(6, 12)))], parent, shard_mb=2, kept=kept)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert made.rows("train") == [2] * 6 and [case.id for case in made.cases("train")] == [case.id for case in items]
    read = read_rows(made.files("train"), made.rows("train"), ["x"], np.array([0, 5, 6, 11]))
    assert read["x"][:, 0].tolist() == [0, 5, 6, 11]
    whole = cases.write_rows(str(tmp_path / "whole"), [("train", batches(range(12)))], parent, shard_mb=2)
    assert whole.checksum == made.checksum
    other = scans.finished(str(tmp_path / "other"), items[2:])
    assert begun(uri, ["train"], other) == {"train": kept["train"][1:] + begun(uri, ["train"], parent)["train"][3:]}
