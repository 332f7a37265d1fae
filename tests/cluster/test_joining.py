"""Commands that join a cluster with token authentication, whose workers stand in another folder."""

import json
import subprocess

import pytest
import saved
from hosts import COMMAND, RAY, ingest, user
from tiny_judge import save

from mu2llm import config
from mu2llm.model import build_contrastive

pytestmark = pytest.mark.slow


def joined(head, folder, *words, **environment):
    """`mu2llm …` run in a folder, as a user of that cluster."""
    command = [COMMAND, *map(str, words), "--address", head.gcs, "--json"]
    return subprocess.run(command, env=user(head, **environment), cwd=folder, capture_output=True, text=True)


def test_relative_places_are_those_of_the_folder_where_the_command_runs(head, ingested, tmp_path):
    """They were looked for where Ray's workers stand: an exception without text, or "out of memory". That every command
    resolves all of them is in tests/cli."""
    (tmp_path / "shards").symlink_to(ingested[0])
    settings = config.load("tiny")
    model = build_contrastive(settings.model, settings.data.spec, settings.contrastive, 32, seed=0)
    saved.untrained(str(tmp_path / "c"), settings, "contrastive", model)
    stage = ("train", "sft", "--preset", "tiny", "--data", "./shards", "--init", "c", "--out", "s")
    done = joined(head, tmp_path, *stage, "--set", "sft.max_steps=2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["steps"] == 2
    assert (tmp_path / "s" / "model.safetensors").is_file()
    judged_by_actors(head, tmp_path)


def judged_by_actors(head, folder):
    """A judge of a language model is held by actors with resources of their own, not by the driver."""
    prompt = folder / "prompt.txt"
    prompt.write_text("{reference} : {candidate}")
    judge = ("--judge", f"hf:{save(folder / 'judge')}", "--set", f"judge.prompt={prompt}", "--set", "judge.actors=1")
    few = ("--set", "judge.max_new_tokens=4", "--set", "evaluation.max_cases=2", "--set", "evaluation.regions=false")
    few += ("--set", "evaluation.text_encoder=none", "--set", "evaluation.paraphrases=2")
    asked = ("evaluate", "--preset", "tiny", "--checkpoint", "s", "--data", "shards", "--out", "e")
    done = joined(head, folder, *asked, *judge, *few)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["judge"].startswith("hf:judge@")
    listed = [RAY, "list", "actors", "--address", head.address, "--detail", "--format", "json", "--limit", "1000"]
    found = subprocess.run(listed, env=user(head), capture_output=True, text=True, check=True).stdout
    actors = [each for each in json.loads(found) if "LocalModel" in json.dumps([each["name"], each["repr_name"]])]
    assert actors and all(each["required_resources"] == {"CPU": 1.0} for each in actors), found[:3000]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN": None}, "asks for a token"),
        ({"RAY_AUTH_TOKEN": "wrong"}, "refused the token"),
    ],
)
def test_a_cluster_that_wants_a_token_says_so(head, scans, tmp_path, environment, says):
    """It was "no Ray cluster", after a minute and a page of Ray's own lines."""
    done = joined(head, tmp_path, *ingest(scans, tmp_path / "shards"), **environment)
    assert done.returncode == 2, done.stderr[-2000:]
    assert says in done.stderr and "RAY_AUTH_MODE=token" in done.stderr and "no Ray cluster" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
