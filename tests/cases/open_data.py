"""Stand-ins for what is openly licensed: rows of the Imaging Data Commons and of LIDC-IDRI's annotations."""

import sqlite3

import pyarrow as pa
import pyarrow.parquet as pq

UUIDS = ("37cf5cd8-d103-4cd0-a446-960bc0ed92a3", "d24a2c63-a8d6-4292-83a6-1db00ae699cc", "085e85b3-3780-47f6-8538-585b")


def idc_row(number, uid, **changes):
    """A row of idc-index-data; its columns and forms are those of version 25.0.5."""
    uuid = UUIDS[number % len(UUIDS)]
    return {
        "collection_id": "lidc_idri",
        "PatientID": f"LIDC-IDRI-{number:04d}",
        "SeriesInstanceUID": uid,
        "StudyInstanceUID": f"study-{number}",
        "Modality": "CT",
        "instanceCount": 4,
        "license_short_name": "CC BY 3.0",
        "crdc_series_uuid": uuid,
        "series_aws_url": f"s3://idc-open-data/{uuid}/*",
        **changes,
    }


def write_index(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def square(x, y, half):
    """An outline as it is stored: neighbouring pixels around a square, `half` from its middle."""
    side = range(-half, half)
    ring = (
        [(i, -half) for i in side]
        + [(half, i) for i in side]
        + [(-i, half) for i in side]
        + [(-half, -i) for i in side]
    )
    return "\n".join(f"{x + i},{y + j}" for i, j in [*ring, ring[0]])


def write_lidc(path, scans, pixel_mm=0.5, step_mm=2.0, slices=51):
    """`{series: [nodule]}`, each nodule (x, y, slice, half, readers, ratings), drawn on three slices."""
    with sqlite3.connect(path) as database:
        database.executescript(
            """CREATE TABLE scans (id INTEGER PRIMARY KEY, study_instance_uid, series_instance_uid, patient_id,
                   slice_thickness, pixel_spacing, contrast_used, is_from_initial, sorted_dicom_file_names);
               CREATE TABLE annotations (id INTEGER PRIMARY KEY, scan_id, _nodule_id, subtlety, internalStructure,
                   calcification, sphericity, margin, lobulation, spiculation, texture, malignancy);
               CREATE TABLE contours (id INTEGER PRIMARY KEY, annotation_id, inclusion, image_z_position,
                   dicom_file_name, coords);
               CREATE TABLE zvals (id INTEGER PRIMARY KEY, scan_id, val);"""
        )
        for number, (series, nodules) in enumerate(scans.items(), 1):
            row = (number, f"study-{number}", series, f"LIDC-IDRI-{number:04d}", step_mm, pixel_mm)
            database.execute("INSERT INTO scans VALUES (?, ?, ?, ?, ?, ?, 0, 0, '')", row)
            heights = [(number, -100 + step_mm * i) for i in range(slices)]
            database.executemany("INSERT INTO zvals (scan_id, val) VALUES (?, ?)", heights)
            for x, y, middle, half, readers, ratings in nodules:
                for _ in range(readers):
                    values = {"calcification": 6, "lobulation": 1, "spiculation": 1, "texture": 5, "malignancy": 3}
                    values |= ratings
                    columns = ", ".join(values)
                    drawn = database.execute(
                        f"INSERT INTO annotations (scan_id, {columns}) VALUES (?, ?, ?, ?, ?, ?)",
                        (number, *values.values()),
                    ).lastrowid
                    heights = [-100 + step_mm * (middle + place) for place in (-1, 0, 1)]
                    database.executemany(
                        "INSERT INTO contours (annotation_id, inclusion, image_z_position, coords) VALUES (?, 1, ?, ?)",
                        [(drawn, z, square(x, y, half)) for z in heights],
                    )
