"""A checkpoint as an algorithm for Grand-Challenge: a folder that is built, tried, saved and uploaded."""

from __future__ import annotations

import platform
import re
import shutil
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import mu2llm
from mu2llm import storage
from mu2llm.artefacts import open_checkpoint, weights_of
from mu2llm.ct import metaimage, phantom
from mu2llm.errors import UserError
from mu2llm.evaluation.exports import place
from mu2llm.evaluation.exports.container import INPUTS, SOCKETS, Sockets
from mu2llm.evaluation.pages import environment
from mu2llm.model import load_processor
from mu2llm.requirements import pins

_FILES = (
    *("Dockerfile", ".dockerignore", "README.md", "inference.py"),
    *("do_build.sh", "do_check.sh", "do_test_run.sh", "do_save.sh"),
)
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "node_modules", "viewer")
_SLUG, _PATH = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*"), re.compile(r"[\w-]+(?:/[\w-]+)*(?:\.json)?")
_PROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "mu2llm"
version = "{version}"

[tool.setuptools.packages.find]
include = ["mu2llm*"]

[tool.setuptools.package-data]
"*" = ["**"]
"""


def grand_challenge(
    checkpoint: str, out: str, socket: str, path: str, output: str, fresh: bool = False
) -> dict[str, Any]:
    """Writes the folder; what the command prints. `socket` is the input image's slug and `path` where its image lies
    below /input, `output` where the report goes below /output, as the phase's sockets say.

    Raises UserError where the checkpoint writes no reports, a name is none of a socket, or `out` is there or remote.
    """
    _check(socket, path, output)
    if storage.is_remote(out):
        raise UserError(f"--out {out}: give a local folder; Docker builds the image there")
    load_processor(checkpoint)
    weights = weights_of(open_checkpoint(checkpoint)).weights
    place.clear(out, fresh)
    folder = Path(storage.resolve(out)[1])
    folder.mkdir(parents=True)
    storage.copy(checkpoint, str(folder / "model"))
    _write_image(folder, checkpoint, Sockets(input=socket, output=output))
    _write_test(folder / "test" / "input", socket, path)
    place.sign(out, "grand-challenge", checkpoint=checkpoint, weights=weights)
    return {"out": str(folder), "input": socket, "output": output, "check": str(folder / "do_check.sh")}


def _check(socket: str, path: str, output: str) -> None:
    if not _SLUG.fullmatch(socket):
        raise UserError(f"--input-socket {socket}: expected a slug, such as ct-image")
    for option, value in (("--input-path", path), ("--output-path", output)):
        if not _PATH.fullmatch(value):
            raise UserError(f"{option} {value}: expected a relative path, such as images/ct or report.json")


def _write_image(folder: Path, checkpoint: str, sockets: Sockets) -> None:
    """All that the image is built of."""
    python = ".".join(platform.python_version_tuple()[:2])
    said = {"python": python, "version": mu2llm.__version__, "checkpoint": checkpoint, **sockets.model_dump()}
    templates = environment("mu2llm.evaluation.exports")
    for name in _FILES:
        target = folder / name
        target.write_text(templates.get_template(f"algorithm/{name}").render(said) + "\n", encoding="utf-8")
        target.chmod(0o755 if name.endswith(".sh") else 0o644)
    (folder / SOCKETS).write_text(sockets.model_dump_json() + "\n")
    needed = [each for each in requires("mu2llm") or [] if "extra ==" not in each]
    lines = (f"{name}=={version}\n" for name, version in pins(*needed).items())
    (folder / "requirements.txt").write_text("".join(lines))
    shutil.copytree(Path(mu2llm.__file__).parent, folder / "package" / "mu2llm", ignore=_LEFT_OUT)
    (folder / "package" / "pyproject.toml").write_text(_PROJECT.format(version=mu2llm.__version__))


def _write_test(folder: Path, socket: str, path: str) -> None:
    """A phantom as the platform mounts a case."""
    made = phantom.make(seed=0, index=0)
    image = folder / path / "phantom.mha"
    image.parent.mkdir(parents=True)
    image.write_bytes(metaimage.encode(made.hu, made.affine))
    about = {"slug": socket, "relative_path": path, "kind": "Image", "super_kind": "Image"}
    storage.write_json(str(folder / INPUTS), [{"interface": about, "image": {"name": image.name}}])
