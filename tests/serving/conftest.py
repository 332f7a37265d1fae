"""One service for all serving tests, over real HTTP, on the Ray that all tests share."""

import httpx
import pytest
from small_service import PATIENT, PATIENT_ID, STUDY, free_port, wait_until_ready
from small_writer import FIRST, write_checkpoint

from mu2llm.settings.serving import ServingConfig


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(str(tmp_path_factory.mktemp("serving") / "first"), FIRST)


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """Folders of the service: its state, kept scans, and one that clients may name by URI."""
    root = tmp_path_factory.mktemp("service")
    for name in ("state", "kept", "allowed"):
        (root / name).mkdir()
    return root


@pytest.fixture(scope="session")
def settings(checkpoint, places):
    from mu2llm.serving.app import Settings

    serving = ServingConfig(
        state=str(places / "state"),
        keep_scans=str(places / "kept"),
        allowed_uris=(f"file://{places}/allowed",),
        max_body_mb=64,
        max_queued_requests=16,
        reading_seconds=60,
        registry_seconds=1,
        drain_seconds=10,
    )
    return Settings(checkpoint=checkpoint, tracking=f"sqlite:///{places}/tracking.db", loopback=True, serving=serving)


@pytest.fixture(scope="session")
def service(ray_cluster, settings):
    """The address of the running, ready service."""
    from mu2llm.serving.running import running

    with running(settings, "127.0.0.1", free_port()) as url:
        wait_until_ready(url)
        yield url


@pytest.fixture
def client(service):
    with httpx.Client(base_url=service, timeout=120) as made:
        yield made


@pytest.fixture(scope="session")
def phantom():
    """A small scan that the model takes: .nii.gz bytes."""
    from mu2llm.ct import phantom

    return phantom.make(3, 1).nifti()


@pytest.fixture(scope="session")
def dicom():
    """The files of a small DICOM series with a patient's name in them."""
    from ct_scans import chest, slices, to_bytes

    series = slices(chest())
    for dataset in series:
        dataset.PatientName, dataset.PatientID = PATIENT, PATIENT_ID
        dataset.StudyInstanceUID = STUDY
    return [to_bytes(dataset) for dataset in series]
