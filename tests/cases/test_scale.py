"""What the driver asks of storage at two sizes of a data set of CT-RATE's form (tests/benchmarks/bench_scale.py)."""

import small_scans as scans
from ct_rate_shaped import write_data

from mu2llm import cases, storage
from mu2llm.cases import volumes
from mu2llm.cases.ingest import plan
from mu2llm.cases.shards import Shards, write_file
from mu2llm.engine import features


def counted(monkeypatch):
    """What is asked of storage, as it is asked."""
    calls = []
    retried = storage.retried

    def ask(what, action):
        calls.append(what)
        return retried(what, action)

    monkeypatch.setattr(storage, "retried", ask)
    return calls


def test_reading_a_manifest_asks_no_more_of_storage_for_each_of_more_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(volumes.ray, "is_initialized", lambda: False)  # the listing's tasks are counted here too
    data = scans.experiment(reconstructions="all").data
    asked = {}
    for count in (40, 160):
        root = tmp_path / str(count)
        write_data(root, count)
        calls = counted(monkeypatch)
        table = cases.read_manifest(f"{root}/tables", "ct-rate", f"{root}/dataset", data)
        assert sum(map(len, plan(table, data).values())) == len(table.cases) == count
        asked[count] = len(calls) / count
    assert 0 < asked[160] <= asked[40] < 3


def test_shards_are_opened_with_as_many_calls_and_their_cache_with_three_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "FILE_SCANS", 4)
    for count in (8, 40):
        items = [scans.case(number) for number in range(count)]
        parent, uri = scans.finished(f"{tmp_path}/{count}", items), f"{tmp_path}/{count}/features"
        for part in features._parts("train", count):
            rows = {"id": [case.id for case in items[part.first : part.end]]}
            write_file(uri, f"train/{part.name}run.parquet", iter([rows]))
        calls = counted(monkeypatch)
        opened = Shards.open(parent.uri)
        assert len(opened.cases("train")) == count and len(opened.rows_of("train", [items[0].id])) == 1
        assert len(calls) == 3
        found = features._finished(uri, opened, {"train": count})
        assert [file.rows for file in found.values()] == [4] * (count // 4)
        assert len(calls) - 3 == 2 + 3 * (count // 4)  # the folder and the ids; footer, footer, size
