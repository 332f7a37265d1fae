"""A folder of CT-RATE's form: two reconstructions a scan, reports of its length, its tables, tiny volumes."""

import csv
import gzip
import hashlib
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

VALID = 3039 / 50188  # of CT-RATE's volumes
SIDE = 24  # voxels of a scan
SENTENCES = (
    "Trachea and both main bronchi are open and no obstructive pathology is observed.",
    "Mediastinal structures cannot be evaluated optimally because contrast material was not given.",
    "Heart contour and size are normal. The diameters of the mediastinal great vessels are normal.",
    "There is a moderate pericardial effusion measuring 12 mm at its thickest point.",
    "Thoracic oesophageal calibration is normal and no significant wall thickening is detected.",
    "A hiatal hernia is seen at the lower end of the oesophagus.",
    "Several lymph nodes with a short axis below 10 mm are seen in the prevascular and paratracheal areas.",
    "Multiple nodules are seen in both lungs, the largest in the right upper lobe with a diameter of 6 mm.",
    "Emphysematous changes are observed in the upper lobes of both lungs.",
    "There is a pleural effusion on the left with a thickness of 22 mm and adjacent atelectasis.",
    "Ground-glass opacities and consolidation are present in the lower lobe of the right lung.",
    "Calcified atheromatous plaques are observed in the walls of the aorta and of the coronary arteries.",
    "Bronchiectasis and peribronchial thickening are observed in the middle lobe.",
    "In the upper abdominal sections within the image liver, spleen and both adrenal glands are normal.",
    "A cyst of 15 mm is observed in the upper pole of the left kidney.",
    "Degenerative changes are seen in the bone structures. Vertebral corpus heights are preserved.",
)


def report(name: str, sentences: int = 12) -> tuple[str, str]:
    """Findings and impression that a name decides, about as long as CT-RATE's (some 180 words and 30)."""
    rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()[:8]))
    chosen = [SENTENCES[i] for i in sorted(rng.permutation(len(SENTENCES))[:sentences])]
    return " ".join(chosen), " ".join(chosen[:2])


def write_data(root: Path, count: int) -> None:
    """A folder of CT-RATE's form: `count` volumes, two of each scan, in reality a few files with many names."""
    (root / "tables").mkdir(parents=True)
    rng = np.random.default_rng(0)
    distinct = []
    for number in range(8):
        voxels = rng.integers(-1000, 400, (SIDE,) * 3).astype(np.int16)
        image = nibabel.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0]))
        distinct.append(root / f"{number}.nii.gz")
        distinct[-1].write_bytes(gzip.compress(image.to_bytes(), 1))
    names = []
    for scan in range(-(-count // 2)):
        part = "valid" if scan < VALID * count / 2 else "train"
        patient, letter = divmod(scan, 2) if scan % 5 == 0 else (scan, 0)  # some patients have two scans
        folder = f"{part}_{patient}/{part}_{patient}_{'ab'[letter]}"
        for reconstruction in (1, 2)[: count - len(names)]:
            name = f"{folder.rpartition('/')[2]}_{reconstruction}.nii.gz"
            path = root / "dataset" / part / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(distinct[len(names) % len(distinct)], path)
            names.append(name)
    for path in distinct:
        path.unlink()
    texts = ((name, report(name.rpartition("_")[0])) for name in names)
    rows = [{"VolumeName": name, "Findings_EN": own[0], "Impressions_EN": own[1]} for name, own in texts]
    _write_csv(root / "tables/reports.csv", rows)
    _write_csv(
        root / "tables/metadata.csv", [{"VolumeName": n, "RescaleSlope": 1, "RescaleIntercept": 0} for n in names]
    )


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
