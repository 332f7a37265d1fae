"""What the exported container does: a scan in /input → its report in /output.

Contract: grand-challenge.org/documentation/runtime-environment, and the example algorithm of
DIAGNijmegen/rse-grand-challenge-forge (306db6e): /input/inputs.json lists the input's sockets, an image lies alone
below its socket's relative path, JSON goes to the output socket's relative path, the model is in /opt/ml/model.
Without inputs.json it is VLM3D's (forithmus/VLM3D-Dockers, 25f9c7b): all scans of /input → /output/results.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError

from mu2llm import config
from mu2llm.artefacts import open_checkpoint
from mu2llm.engine.scans import ScanPlace, report_scans
from mu2llm.errors import Failure, explain
from mu2llm.evaluation.exports.reports import results_json

INPUTS, SOCKETS = "inputs.json", "sockets.json"
SCANS = (".mha", ".nii.gz", ".nii")


class Sockets(BaseModel):
    """sockets.json: the slug of the input image's socket, and the relative path of the report's."""

    input: str
    output: str


class Interface(BaseModel):
    slug: str
    relative_path: str


class SocketValue(BaseModel):
    """One entry of inputs.json, of which nothing else is needed."""

    interface: Interface


def main(folder: Path) -> int:
    """The entry point beside sockets.json in `folder`; the exit code. The platform's three places may be set in the
    environment: MU2LLM_INPUT, MU2LLM_OUTPUT, MU2LLM_MODEL."""
    places = {name: Path(os.environ.get(f"MU2LLM_{name.upper()}", at)) for name, at in PLACES.items()}
    try:
        sockets = Sockets.model_validate_json((folder / SOCKETS).read_text())
        run(places["input"], places["output"], str(places["model"]), sockets)
    except Exception as error:
        code, line = explain(error)
        print(line, file=sys.stderr)
        return code
    return 0


PLACES = {"input": "/input", "output": "/output", "model": "/opt/ml/model"}


def run(input: Path, output: Path, model: str, sockets: Sockets) -> None:
    """Reads `input`, writes `output`. Raises Failure where the input is not what the sockets say, or a scan alone
    cannot be used; of several, one that cannot gets an empty report, and stderr says why."""
    if (input / INPUTS).is_file():
        [entry] = _report(model, [_image(input, sockets)])
        if "report" not in entry:
            raise Failure(f"{entry['path']}: {entry['rejected']}: {entry['message']}")
        _write(output / sockets.output, entry["report"])
        return
    scans = sorted(path for path in input.iterdir() if path.name.lower().endswith(SCANS))
    if not scans:
        raise Failure(f"{input} has neither {INPUTS} nor scans ({', '.join(SCANS)})")
    entries = _report(model, scans)
    for entry in entries:
        if "report" not in entry:
            print(f"{entry['path']}: {entry['rejected']}: {entry['message']}; its report is empty", file=sys.stderr)
    _write(output / "results.json", results_json({stem(e["path"]): e.get("report", "") for e in entries}))


def stem(path: str) -> str:
    """A scan's file name without its suffix."""
    name = Path(path).name
    return next((name[: -len(suffix)] for suffix in SCANS if name.lower().endswith(suffix)), name)


def _image(input: Path, sockets: Sockets) -> Path:
    """The one image of the input's socket."""
    try:
        values = TypeAdapter(list[SocketValue]).validate_json((input / INPUTS).read_bytes())
    except ValidationError as error:
        raise Failure(f"{input / INPUTS} is no list of sockets: {error.errors()[0]['msg']}") from None
    slugs = sorted(value.interface.slug for value in values)
    if slugs != [sockets.input]:
        raise Failure(f"{INPUTS} has the sockets {', '.join(slugs)}; this algorithm takes {sockets.input}")
    folder = input / values[0].interface.relative_path
    images = sorted(folder.glob("*.mha"))
    if len(images) != 1:
        raise Failure(f"{folder} holds {len(images)} .mha files, expected one")
    return images[0]


def _report(model: str, scans: list[Path]) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    experiment = config.override(open_checkpoint(model).experiment, [f"evaluation.device={device}"])
    return report_scans(model, [ScanPlace(str(path)) for path in scans], experiment.evaluation)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
