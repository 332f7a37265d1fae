"""Ingest on Ray Data: what is written, what is rejected and why, and that a run goes on where the last one was."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import small_scans as scans
from ct_scans import metaimage, nifti, nrrd, slices, to_bytes

from mu2llm import cases, config, ct, storage
from mu2llm.cases import node_memory
from mu2llm.cases.ingest import _bytes, _excluded, _too_large, group_table, plan, schema, write_shard
from mu2llm.cases.shards import read_summary
from mu2llm.cases.table import CaseTable
from mu2llm.errors import Failure, UserError
from mu2llm.records import Case

COUNT = 40


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    scans.write(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def whole(ray_cluster, source, tmp_path_factory):
    """(folder, result) of an ingest that nothing disturbed."""
    out = tmp_path_factory.mktemp("shards") / "out"
    return out, run(source, out)


def run(source, out, **data):
    experiment = scans.experiment(**data)
    return cases.ingest(read(source, experiment), str(out), experiment)


def read(source, experiment):
    return cases.read_manifest(str(source / "manifest.jsonl"), "jsonl", str(source), experiment.data)


def copy(source, folder):
    shutil.copytree(source, folder)
    return folder


def test_the_result_says_what_was_written(whole):
    out, result = whole
    assert result["cases"] == result["written"] == COUNT == sum(result["splits"].values())
    assert result["rejected"] == {} and result["seconds"] > 0
    assert result["bytes"] == sum(path.stat().st_size for path in out.glob("*/*.parquet"))
    assert list(result) == ["cases", "written", "rejected", "seconds", "bytes", "splits"]
    assert pq.read_table(out / "rejected.parquet").num_rows == 0


def test_shards_hold_each_scan_as_prepared_one_a_row_group(whole, source):
    shards = cases.Shards.open(str(whole[0]))
    assert shards.spec == scans.SPEC and shards.index.experiment["name"] == "custom"
    seen = []
    for file in shards.files("train"):
        parquet = pq.ParquetFile(file)
        assert parquet.num_row_groups == parquet.metadata.num_rows
        assert set(parquet.schema_arrow.names) > {"id", "patient", "report", "voxels", "chunk_mask", "warnings"}
    for batch in cases.Stream(shards, "train", ["id", "voxels", "chunk_mask", "spacing_mm"], 8, None):
        for name, voxels, mask, spacing in zip(
            batch["id"], batch["voxels"], batch["chunk_mask"], batch["spacing_mm"], strict=True
        ):
            expected = ct.prepare(ct.read(source / "volumes" / f"{name}.nii.gz"), scans.SPEC)
            np.testing.assert_array_equal(voxels, expected.voxels)
            np.testing.assert_array_equal(mask, expected.chunk_mask)
            np.testing.assert_allclose(spacing, (3, 3, 5))
            seen.append(name)
    assert seen == [case.id for case in shards.cases("train")] and len(seen) == whole[1]["splits"]["train"]


def test_patients_are_in_one_split(whole):
    shards = cases.Shards.open(str(whole[0]))
    patients = [{case.patient for case in shards.cases(split)} for split in ("train", "validation", "test")]
    assert sum(map(len, patients)) == len(set.union(*patients)) == COUNT // 2


def test_run_again_it_writes_nothing_and_says_the_same(whole, source, tmp_path):
    out = copy(whole[0], tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")}
    again = run(source, out)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")} == before
    assert {**again, "seconds": 0} == {**whole[1], "seconds": 0}


def test_what_is_missing_is_made_and_what_is_left_over_goes(whole, source, tmp_path):
    out = copy(whole[0], tmp_path / "out")
    checksum = cases.Shards.open(str(out)).checksum
    gone, *kept = sorted(out.glob("train/*.parquet"))
    before = {path: path.stat().st_mtime_ns for path in kept}
    gone.unlink()
    (out / "shards.json").unlink()
    (out / "train" / ".half.parquet.123").write_bytes(b"half")
    shutil.copy(kept[0], out / "train" / "99999-abcdef.parquet")
    run(source, out)
    assert cases.Shards.open(str(out)).checksum == checksum
    assert gone.exists() and sorted(out.glob("train/*")) == sorted([gone, *kept])
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_a_killed_run_goes_on_without_duplicates(ray_cluster, whole, source, tmp_path):
    out = tmp_path / "out"

    @ray.remote(num_cpus=0)
    def killed(table, experiment):
        cases.ingest(table, str(out), experiment, progress=lambda done, of: time.sleep(3600))

    task = killed.remote(read(source, scans.experiment()), scans.experiment())
    while not list(out.glob("*/*.parquet")):
        assert not ray.wait([task], timeout=0.05)[0]
    ray.cancel(task, force=True)
    with pytest.raises(ray.exceptions.RayError):
        ray.get(task)
    assert not (out / "shards.json").exists()
    with pytest.raises(UserError, match="no finished shards"):
        cases.Shards.open(str(out))
    first = {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")}
    result = run(source, out)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert {**result, "seconds": 0} == {**whole[1], "seconds": 0}
    assert cases.Shards.open(str(out)).checksum == cases.Shards.open(str(whole[0])).checksum


def test_bad_scans_are_rejected_with_their_reason_and_all_else_is_written(whole, source, tmp_path):
    bad = copy(source, tmp_path / "bad")
    (bad / "volumes" / "case-000.nii.gz").write_bytes(b"")
    (bad / "volumes" / "case-001.nii.gz").write_bytes(b"not a scan" * 100)
    data = (bad / "volumes" / "case-002.nii.gz").read_bytes()
    (bad / "volumes" / "case-002.nii.gz").write_bytes(data[: len(data) // 2])
    (bad / "volumes" / "case-003.nii.gz").unlink()
    labels = np.random.default_rng(0).integers(0, 4, (24, 24, 12)).astype(np.int16)
    nib.save(nib.Nifti1Image(labels, np.diag([3.0, 3.0, 5.0, 1.0])), bad / "volumes" / "case-004.nii.gz")
    out = tmp_path / "out"
    with pytest.raises(Failure, match=r"5 of 40 scans were rejected \(.*not_hu 1.*\), over data.rejection_budget 0.05"):
        run(bad, out)
    rejected = pq.read_table(out / "rejected.parquet").to_pylist()
    reasons = {row["case_id"]: row["reason"] for row in rejected}
    wanted = ("empty", "wrong_suffix", "truncated", "not_found", "not_hu")
    assert reasons == {f"case-00{number}": reason for number, reason in enumerate(wanted)}
    assert all(row["uri"].endswith(f"{row['case_id']}.nii.gz") and row["message"] for row in rejected)
    shards = cases.Shards.open(str(out))
    assert sum(shards.count(split) for split in ("train", "validation", "test")) == COUNT - 5
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["listed"]["not_found"] == ["case-003"]

    within = run(bad, out, rejection_budget=0.2)
    assert sum(within["rejected"].values()) == 5
    accepted = run(bad, out, rejection_budget=0.2, accept=("not_hu",))
    assert accepted["written"] == COUNT - 4 and "not_hu" not in accepted["rejected"]

    shutil.copy(source / "volumes" / "case-002.nii.gz", bad / "volumes" / "case-002.nii.gz")
    shutil.copy(source / "volumes" / "case-003.nii.gz", bad / "volumes" / "case-003.nii.gz")
    mended = run(bad, out, rejection_budget=0.2)
    assert mended["rejected"] == {"empty": 1, "not_hu": 1, "wrong_suffix": 1} and mended["written"] == COUNT - 3


def test_shards_of_another_spec_are_not_overwritten(whole, source, tmp_path):
    out = copy(whole[0], tmp_path / "out")
    other = scans.SPEC.model_copy(update={"name": "other", "windows": ((-120, 220),)})
    with pytest.raises(UserError, match="holds shards of another spec than other"):
        run(source, out, spec=other)


def test_an_unknown_code_to_accept_is_a_user_error(ray_cluster, source, tmp_path):
    with pytest.raises(UserError, match="no_such_code"):
        run(source, tmp_path / "out", accept=("no_such_code",))


def test_series_that_share_a_folder_are_told_apart(tmp_path):
    (tmp_path / "study").mkdir()
    for number, name in enumerate(("1.2.3.10", "1.2.3.20", "1.2.3.20")):  # the last one's second phase
        for index, one in enumerate(slices(scans.body(number), SeriesInstanceUID=name, AcquisitionNumber=number)):
            (tmp_path / "study" / f"{number}-{index}.dcm").write_bytes(to_bytes(one))
    named = {"a": "1.2.3.10", "b": "1.2.3.20", "c": "1.2.3.30", "d": "1.2.3.20#2"}
    rows = [{"id": id, "volume": "study", "report": "r", "series": name} for id, name in named.items()]
    scans.write_manifest(tmp_path / "manifest.jsonl", rows)
    experiment = scans.experiment(split={"train": 1, "validation": 0, "test": 0})
    ((path, group),) = plan(read(tmp_path, experiment), experiment.data).items()
    write_shard(group_table(path, group), str(tmp_path / "out"), experiment.data)
    written = {row["id"]: row for row in pq.read_table(tmp_path / "out" / path).to_pylist()}
    assert set(written) == {"a", "b", "d"}
    for id, seed in {"a": 0, "b": 1, "d": 2}.items():
        expected = ct.prepare(ct.read([to_bytes(one) for one in slices(scans.body(seed))]), experiment.data.spec)
        assert written[id]["series"] == named[id]
        assert bytes(np.array(written[id]["voxels"])) == bytes(expected.voxels)
    (rejected,) = read_summary(str(tmp_path / "out" / path))["rejected"]
    assert (rejected["case_id"], rejected["reason"]) == ("c", "no_series")


def test_the_chunks_of_a_case_s_series_stand_one_behind_the_other(tmp_path):
    for number in range(3):
        scans.save(tmp_path / f"{number}.nii.gz", number)
    (tmp_path / "broken.nii.gz").write_bytes(b"no scan")
    places = {"both": ["0.nii.gz", "1.nii.gz"], "turned": ["1.nii.gz", "0.nii.gz"], "one": "2.nii.gz"}
    rows = [{"id": id, "volume": place, "report": "r"} for id, place in places.items()]
    rows.append({"id": "half", "volume": ["2.nii.gz", "broken.nii.gz"], "report": "r"})
    scans.write_manifest(tmp_path / "manifest.jsonl", rows)
    spec = scans.SPEC.model_copy(update={"series": 2})
    experiment = scans.experiment(spec=spec, split={"train": 1, "validation": 0, "test": 0})
    table = read(tmp_path, experiment)
    ((path, group),) = plan(table, experiment.data).items()
    write_shard(group_table(path, group), str(tmp_path / "out"), experiment.data)
    written = {row["id"]: row for row in pq.read_table(tmp_path / "out" / path).to_pylist()}
    alone = [ct.prepare(ct.read(tmp_path / f"{n}.nii.gz"), scans.SPEC).voxels.tobytes() for n in range(3)]
    voxels = {id: bytes(row["voxels"]) for id, row in written.items()}
    assert voxels == {
        "both": alone[0] + alone[1],
        "turned": alone[1] + alone[0],
        "one": alone[2] + bytes(len(alone[2])),
    }
    masks = {id: list(bytes(row["chunk_mask"])) for id, row in written.items()}
    assert masks == {"both": [1, 1, 1, 1], "turned": [1, 1, 1, 1], "one": [1, 1, 0, 0]}
    assert "series_missing" in written["one"]["warnings"] and "series_missing" not in written["both"]["warnings"]
    assert Case.from_row(written["both"]).every_series == group[[c.id for c in group].index("both")].every_series
    (rejected,) = read_summary(str(tmp_path / "out" / path))["rejected"]
    assert rejected["case_id"] == "half" and rejected["message"].startswith("series 2 of 2 (")
    assert plan(read(tmp_path, experiment), experiment.data).keys() == {path}
    scans.save(tmp_path / "1.nii.gz", 9)
    assert plan(read(tmp_path, experiment), experiment.data).keys() != {path}, "a second series was replaced"


def test_the_series_of_a_study_are_one_case_where_they_are_to_be_put_together(tmp_path):
    for place, names in {"two": ("1.1", "1.2"), "one": ("1.3",)}.items():
        (tmp_path / place).mkdir()
        for number, name in enumerate(names):
            for index, each in enumerate(slices(scans.body(number)[..., number:], SeriesInstanceUID=name)):
                (tmp_path / place / f"{name}-{index}.dcm").write_bytes(to_bytes(each))
    scans.save(tmp_path / "0.nii.gz", 0)
    (tmp_path / "broken.nii.gz").write_bytes(b"no scan")
    rows = [{"id": id, "volume": id, "report": "r"} for id in ("two", "one")]
    rows += [{"id": "named", "volume": "two", "series": "1.2", "report": "r"}]
    rows += [{"id": "listed", "volume": ["0.nii.gz", "broken.nii.gz"], "report": "r"}]
    scans.write_manifest(tmp_path / "manifest.jsonl", rows)
    spec = scans.SPEC.model_copy(update={"series": 2})
    split = {"train": 1, "validation": 0, "test": 0}
    experiment = scans.experiment(spec=spec, split=split, reconstructions="together")
    ((path, group),) = plan(read(tmp_path, experiment), experiment.data).items()
    assert path not in plan(read(tmp_path, experiment), scans.experiment(spec=spec, split=split).data)
    write_shard(group_table(path, group), str(tmp_path / "out"), experiment.data)
    written = {row["id"]: row for row in pq.read_table(tmp_path / "out" / path).to_pylist()}
    summary = read_summary(str(tmp_path / "out" / path))
    assert set(written) == {"two", "one", "named", "listed"} and summary["rejected"] == []
    assert set(summary["fewer_series"]) == {"one", "named", "listed"}
    case = Case.from_row(written["two"])
    assert [(Path(each.volume).name, each.series) for each in case.every_series] == [("two", "1.1"), ("two", "1.2")]
    for number, name in enumerate(("1.1", "1.2")):
        alone = ct.prepare(ct.read(tmp_path / "two", series=name), scans.SPEC).voxels.tobytes()
        assert bytes(written["two"]["voxels"])[number * len(alone) :][: len(alone)] == alone
    assert "series_unusable" in written["listed"]["warnings"] and "series_unusable" not in written["one"]["warnings"]
    with pytest.raises(UserError, match=r"^configuration: data: data\.reconstructions=together needs .* it is 1$"):
        config.load("tiny", ["data.reconstructions=together"])
    with pytest.raises(UserError, match="--format lidc has one series a case"):
        cases.read_manifest(str(tmp_path / "manifest.jsonl"), "lidc", str(tmp_path), experiment.data)


def test_shards_of_one_series_are_as_before():
    assert "further" not in schema(scans.SPEC).names
    assert "further" in schema(scans.SPEC.model_copy(update={"series": 2})).names
    (path,) = plan(CaseTable(cases=[scans.case(0)]), scans.experiment().data)
    assert path == "train/00000-4e1c853d5d78.parquet"


def test_every_format_of_a_scan_gives_the_same_row(tmp_path):
    body = scans.body(0)
    files = {"a.nii.gz": nifti(body), "b.mha": metaimage(body), "c.nrrd": nrrd(body), "d.nrrd": nrrd(body)[:-9]}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    scans.write_manifest(tmp_path / "manifest.jsonl", [{"id": n[0], "volume": n, "report": "r"} for n in files])
    experiment = scans.experiment(split={"train": 1, "validation": 0, "test": 0})
    ((path, group),) = plan(read(tmp_path, experiment), experiment.data).items()
    write_shard(group_table(path, group), str(tmp_path / "out"), experiment.data)
    written = {row["id"]: row["voxels"] for row in pq.read_table(tmp_path / "out" / path).to_pylist()}
    assert set(written) == {"a", "b", "c"} and written["a"] == written["b"] == written["c"]
    (rejected,) = read_summary(str(tmp_path / "out" / path))["rejected"]
    assert (rejected["case_id"], rejected["reason"]) == ("d", "truncated")


def summary_of(source, out, data):
    """The first shard's cases and its task's summary."""
    (path, group), *_ = plan(read(source, scans.experiment()), data).items()
    (summary,) = write_shard(group_table(path, group), str(out), data)["summary"].to_pylist()
    return path, group, json.loads(summary)


def test_storage_that_fails_is_a_failure_not_a_rejection(source, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "BACK_OFF_S", 0.0001)
    data = scans.experiment().data

    def refuse(*_, **__):
        raise PermissionError("denied")

    monkeypatch.setattr(ct, "read", refuse)
    _, group, summary = summary_of(source, tmp_path, data)
    assert [row["case_id"] for row in summary["failures"]] == [case.id for case in group]
    assert {row["reason"] for row in summary["failures"]} == {"unreadable"}
    assert "storage failed 5 times: denied" in summary["failures"][0]["message"]
    assert not list(tmp_path.rglob("*parquet*"))
    monkeypatch.undo()
    path, group, _ = summary_of(source, tmp_path, data)
    assert read_summary(f"{tmp_path}/{path}")["ids"] == [case.id for case in group]


def test_an_error_of_our_own_names_the_case_and_has_its_trace(source, tmp_path, monkeypatch):
    def broken(volume, spec):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(ct, "prepare", broken)
    _, group, summary = summary_of(source, tmp_path, scans.experiment().data)
    assert len(summary["failures"]) == len(group)
    first = summary["failures"][0]
    assert (first["case_id"], first["reason"]) == (group[0].id, "unexpected")
    assert first["message"] == "ZeroDivisionError: oops" and "in broken" in first["trace"]


def planned(table):
    """Path of each shard → the ids of its cases."""
    return {path: [case.id for case in group] for path, group in plan(table, scans.experiment().data).items()}


def failing(denied, deadly):
    """`write_shard` in a cluster whose storage denies the scan of one case, and whose task of one shard dies."""

    def write(group, out, data, begun):
        read, pause = ct.read, storage.BACK_OFF_S

        def refuse(source, **options):
            if group["path"][0].as_py() == deadly:
                os._exit(1)
            if denied in str(source):
                raise PermissionError("denied")
            return read(source, **options)

        ct.read, storage.BACK_OFF_S = refuse, 0.0001
        try:
            return write_shard(group, out, data, begun)
        finally:
            ct.read, storage.BACK_OFF_S = read, pause

    return write


def test_scans_that_fail_end_nothing_and_the_ingest_fails_at_its_end(whole, source, tmp_path, monkeypatch):
    table = read(source, scans.experiment())
    shards = planned(table)
    first, *_, last = shards
    denied, lost = shards[first][0], shards[last]
    volume = next(case.volume for case in table.cases if case.id == denied)
    table.facts[volume] = table.facts[volume]._replace(bytes=2**26)  # so that there are two size classes
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["mu2llm.cases.ingest"], "write_shard", failing(denied, last))
        says = rf"{1 + len(lost)} scans failed \(unexpected {len(lost)}, unreadable 1\), such as case .*data.exclude"
        with pytest.raises(Failure, match=says):
            cases.ingest(table, str(tmp_path), scans.experiment())
    failed = {row["case_id"]: row for row in pq.read_table(tmp_path / "failed.parquet").to_pylist()}
    assert failed.keys() == {denied, *lost} and failed[denied]["reason"] == "unreadable"
    assert "denied" in failed[denied]["trace"] and "died 3 times" in failed[lost[0]]["message"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.parquet")}
    assert {f"{path.parent.name}/{path.name}" for path in written} == set(shards) - {first, last}
    with pytest.raises(UserError, match="no finished shards"):
        cases.Shards.open(str(tmp_path))

    result = cases.ingest(table, str(tmp_path), scans.experiment(exclude=(denied,)))
    assert (result["cases"], result["written"], result["rejected"]) == (COUNT - 1, COUNT - 1, {})
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert not (tmp_path / "failed.parquet").exists() and not (tmp_path / "begun").exists()
    assert json.loads((tmp_path / "manifest.json").read_text())["listed"]["excluded"] == [denied]


def test_what_is_excluded_is_a_case_or_a_volume(source, tmp_path):
    table = read(source, scans.experiment())
    experiment = scans.experiment(exclude=("case-001", table.cases[2].volume))
    assert _excluded(table, experiment.data) == {"case-001", "case-002"}
    before, after = (plan(table, experiment.data, out) for out in ((), ("case-001", "case-002")))
    assert len(after) == len(before) and 1 <= len(set(after) - set(before)) <= 2
    with pytest.raises(UserError, match=r"data\.exclude: 'case-9' is neither"):
        _excluded(table, scans.experiment(exclude=("case-9",)).data)


def test_a_task_asks_for_the_memory_of_its_own_scans(source, monkeypatch):
    """One outlier makes one task ask for much; what no node has room for is rejected with its reason."""
    table = read(source, scans.experiment())
    large = table.cases[0]
    table.facts[large.volume] = table.facts[large.volume]._replace(bytes=2**30)
    groups = plan(table, scans.experiment().data)
    node = 64 * 2**30
    asks = [node_memory.asked(_bytes(table, group), node) for group in groups.values()]
    assert sorted(asks)[-2:] == [2**29 + 2**27, 2**29 + 2**33] and len(asks) > 2
    assert node_memory.asked(2**30, 4 * 2**30) == 4 * 2**30 and not _too_large(table, 4 * 2**30)
    rejected = _too_large(table, 2**31)
    assert list(rejected) == [large.id] and rejected[large.id].reason == "too_large"
    assert not _too_large(table, None)


def test_the_largest_node_is_one_that_runs_tasks_or_may_be_added(monkeypatch):
    def node(memory, cpus, alive=True):
        return {"Alive": alive, "Resources": {"memory": memory, "CPU": cpus}}

    nodes = [node(8.0, 4), node(64.0, 0), node(32.0, 4, False)]
    monkeypatch.setattr(node_memory.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(node_memory.private_apis, "cluster_limits", lambda: None)
    assert node_memory.largest_node() == 8
    group = SimpleNamespace(resources={"CPU": 2, "memory": 16}, max_count=3)
    limits = SimpleNamespace(
        node_group_configs=[group, SimpleNamespace(resources={"CPU": 9, "memory": 99}, max_count=0)]
    )
    monkeypatch.setattr(node_memory.private_apis, "cluster_limits", lambda: limits)
    assert node_memory.largest_node() == 16
    nodes.clear()
    limits.node_group_configs.clear()
    assert node_memory.largest_node() is None


def test_the_plan_depends_on_the_cases_alone(source):
    data = scans.experiment().data
    table = read(source, scans.experiment())
    groups = plan(table, data)
    table.cases.reverse()
    assert plan(table, data) == groups
    assert sorted(case.id for group in groups.values() for case in group) == sorted(case.id for case in table.cases)
    large = scans.SPEC.model_copy(update={"grid": (64, 128, 128)})  # 1 MiB a scan
    small = plan(table, data.model_copy(update={"spec": large, "shard_mb": 3}))
    assert max(len(group) for group in small.values()) == 3
    other = data.model_copy(update={"accept": ("not_hu",)})
    assert not set(plan(table, other)) & set(groups)


def test_a_shard_at_the_papers_size_has_more_than_two_rows():
    """CT-RATE was 25,000 files, of which a reader keeps some open."""
    table = CaseTable()
    table.cases += [scans.case(number).model_copy(update={"split": "train"}) for number in range(400)]
    sizes = [len(group) for group in plan(table, config.load("paper").data).values()]
    assert max(sizes) == 21 and sum(sizes) == 400


def test_what_was_replaced_is_planned_anew_and_nothing_else(tmp_path):
    """A file of the same size, and one slice of a folder; what nobody touched keeps its shard."""
    rows = scans.write(tmp_path, 40)
    (tmp_path / "volumes" / "series").mkdir()
    for number in range(3):
        (tmp_path / "volumes" / "series" / f"IM{number}").write_bytes(bytes(100))
    rows[1]["volume"] = "volumes/series"
    scans.write_manifest(tmp_path / "manifest.jsonl", rows)
    experiment = scans.experiment()

    def planned():
        return {
            path: {case.id for case in group}
            for path, group in plan(read(tmp_path, experiment), experiment.data).items()
        }

    (tmp_path / "volumes" / "two.mhd").write_bytes(metaimage(scans.body(2), ElementDataFile="two.raw"))
    (tmp_path / "volumes" / "two.raw").write_bytes(bytes(100))
    rows[2]["volume"] = "volumes/two.mhd"
    scans.write_manifest(tmp_path / "manifest.jsonl", rows)
    before = planned()
    for name, replaced in (("case-000", "case-000.nii.gz"), ("case-001", "series/IM1"), ("case-002", "two.raw")):
        path = tmp_path / "volumes" / replaced
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))
        after = planned()
        anew = [ids for path, ids in after.items() if path not in before]
        assert (
            len(anew) == 1
            and name in anew[0]
            and sorted(after.values(), key=sorted) == sorted(before.values(), key=sorted)
        )
        before = after
