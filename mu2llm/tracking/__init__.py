"""MLflow behind one small door: a run a stage, the model registry and its alias `champion`.

What is tracked is first written to the local disk (`spool`) and sent from there (`sender`), so a tracking server that
is down neither stops nor slows anything: what it missed is sent by the next command that tracks, or `mu2llm runs sync`.
"""

from mu2llm.tracking.client import EXPERIMENT, MODEL, shown, store
from mu2llm.tracking.environment import git_commit, versions
from mu2llm.tracking.reading import Ancestor, Run, differences, find, history, id_of, lineage, place, runs, tags
from mu2llm.tracking.registry import (
    Alias,
    aliases,
    checkpoints,
    locate,
    register,
    registered,
    release,
    set_alias,
    source,
    version_of,
    version_tags,
)
from mu2llm.tracking.sender import Delivery, deliver, refused, waiting
from mu2llm.tracking.writing import StageRun, end_stage, start_stage, under

__all__ = [
    "EXPERIMENT",
    "MODEL",
    "Alias",
    "Ancestor",
    "Delivery",
    "Run",
    "StageRun",
    "aliases",
    "checkpoints",
    "deliver",
    "differences",
    "end_stage",
    "find",
    "git_commit",
    "history",
    "id_of",
    "lineage",
    "locate",
    "place",
    "refused",
    "register",
    "registered",
    "release",
    "runs",
    "set_alias",
    "shown",
    "source",
    "start_stage",
    "store",
    "tags",
    "under",
    "version_of",
    "version_tags",
    "versions",
    "waiting",
]
