"""What of a working directory is sent with a job: code and configuration; never data, weights or secrets."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mu2llm.errors import UserError

LIMIT_MIB = 50
FOLDERS = {"tests", "docs", "node_modules", "mu2llm-demo", "build", "dist", "__pycache__"}
DATA = (
    *(
        "*.nii",
        "*.nii.gz",
        "*.dcm",
        "*.mha",
        "*.mhd",
        "*.raw",
        "*.zraw",
        "*.nrrd",
        "*.nhdr",
        "*.npy",
        "*.npz",
        "*.parquet",
        "*.h5",
    ),
    *("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.ckpt", "*.db", "*.zip", "*.tar", "*.gz", "*.whl"),
)
SECRETS = (
    *("*.env", "*.pem", "*.key", "*.p12", "id_*", "*auth_token*", "*credentials*", "kubeconfig*"),
    *("*secret*.yaml", "*secret*.json"),
)


def files(folder: Path) -> list[Path]:
    """What is sent of a folder, relative to it and sorted: of a git checkout what git knows or would add."""
    listed = _git_files(folder)
    found = listed if listed is not None else _walk(folder)
    return sorted(path for path in found if _is_sent(path) and (folder / path).is_file())


def pack(folder: Path, into: Path, limit_mib: float = LIMIT_MIB) -> int:
    """Copies what is sent below `into`; its bytes. A UserError over the limit names the largest files."""
    sent = files(folder)
    sizes = {path: (folder / path).stat().st_size for path in sent}
    total = sum(sizes.values())
    if total > limit_mib * 2**20:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:5]
        named = ", ".join(f"{path} ({sizes[path] / 2**20:.1f} MiB)" for path in largest)
        raise UserError(
            f"{folder} holds {total / 2**20:.0f} MiB to send, over {limit_mib:g}: {named}; move data to storage, "
            "or name it in .gitignore"
        )
    for path in sent:
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, target)
    return total


def _is_sent(path: Path) -> bool:
    left_out = any(part in FOLDERS for part in path.parts[:-1]) or any(part.startswith(".") for part in path.parts)
    name = path.name.lower()
    return not left_out and not any(fnmatch.fnmatch(name, pattern) for pattern in (*DATA, *SECRETS))


def _git_files(folder: Path) -> list[Path] | None:
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return [Path(name) for name in listed.stdout.split("\0") if name] if listed.returncode == 0 else None


def _walk(folder: Path) -> list[Path]:
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in FOLDERS and not name.startswith(".")]
        found += [Path(root, name).relative_to(folder) for name in names]
    return found


def check_no_secret(texts: Sequence[str]) -> None:
    """A UserError where a job's arguments or environment would carry a password for all to see in the job list."""
    for text in texts:
        if found := re.search(r"\w+://[^/\s:@]*:[^/\s@]+@", text):
            where = text[: found.start()].rstrip("=@") or "an option"
            raise UserError(f"{where}: the URL holds a password, which the job list would show; {_MEND}")


def check_environment(variables: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` lines → variables; a UserError for one that is a secret by its name."""
    found: dict[str, str] = {}
    for text in variables:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise UserError(f"--env {name}: expected NAME=VALUE")
        if any(word in name.upper() for word in ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")):
            raise UserError(f"--env {name}: a job's environment can be read in the job list; {_MEND}")
        found[name] = value
    check_no_secret(variables)
    return found


_MEND = "put it in the environment of the cluster's nodes instead (a Kubernetes secret: cluster/README.md)"
