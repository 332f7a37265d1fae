"""Which steps of the pipeline are done, and where: with stand-ins for ingest, stages, pairs and evaluation.

What identifies a step is the real thing: the stages' jobs, the pairs' and the evaluation's identities.
"""

import csv
import hashlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import saved

from mu2llm import artefacts, config, green, pipeline, places, storage, tracking
from mu2llm.cases import ingest, read_manifest
from mu2llm.ct import phantom
from mu2llm.errors import UserError
from mu2llm.evaluation.audits import Audit
from mu2llm.evaluation.results import METRICS, Difference, Header, Results, RunResult
from mu2llm.records import Estimate, PreferencePair
from mu2llm.stages.job import finished
from mu2llm.stages.preferences import Preferences, identify

EXECUTION = ("sft.log_steps=7", "sft.workers=2", "evaluation.pages=3", "preferences.batch_size=3")
FIRST = ["ingest", "contrastive", "sft", "preferences", "dpo", "evaluate", "register"]


class Way:
    """Runs the pipeline on stand-ins; `did` is what the last run did. Every training gives other weights."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.out, self.did = folder, folder / "out", []
        self.pages, self.killed_in = [], None
        self.numbers = itertools.count()
        self.manifest = folder / "manifest.jsonl"
        self.manifest.write_text("eight cases")
        self.cases, self.splits = 8, ("train", "validation", "test")
        patched = {
            "read_manifest": lambda *_: SimpleNamespace(cases=[SimpleNamespace(split=each) for each in self.splits]),
            "ingest": self.ingest, "prefer": self.prefer, "compare": self.compare,
            "render": lambda out, experiment: self.pages.append(experiment.evaluation.pages),
            "promote": self.promote, "STAGES": {name: Stage(self, module) for name, module in pipeline.STAGES.items()},
        }  # fmt: skip
        for name, value in patched.items():
            monkeypatch.setattr(pipeline, name, value)

    def run(self, *overrides, fresh=False):
        self.did = []
        source = pipeline.Source(str(self.manifest), str(self.folder))
        experiment = config.load("tiny", list(overrides))
        return pipeline.run(experiment, str(self.out), source, lambda *_: None, fresh=fresh)

    def does(self, step, place):
        self.did.append(step)
        storage.write_bytes(storage.join(f"{place}.state" if step in pipeline.STAGES else place, "half"), b"")
        if step == self.killed_in:
            raise KeyboardInterrupt

    def ingest(self, table, shards, experiment, progress):
        self.does("ingest", shards)
        saved.shards(shards, experiment, self.cases, scans=f"{self.cases} scans, {experiment.data.split}")
        return {"cases": self.cases}

    def prefer(self, checkpoint, data, out, experiment, judge, progress):
        self.does("preferences", out)
        shards = pipeline.Shards.open(data)
        identity = identify(checkpoint, shards, experiment)
        weights = artefacts.weights_of(artefacts.open_checkpoint(checkpoint)).weights
        pair = PreferencePair(
            **{"case_id": shards.cases("train")[0].id, "prompt": "?", "chosen": weights, "judge": "rules"},
            **{"rejected": f"{experiment.preferences.margin} worse", "chosen_score": 1, "rejected_score": 0},
        )
        with storage.staged(storage.join(out, "pairs.parquet")) as path:
            pq.write_table(PreferencePair.table([pair]), path)
        made = Preferences(
            **{"shards": data, "data_checksum": shards.checksum, "spec_hash": shards.spec.hash, "split": "train"},
            **{"checkpoint": checkpoint, "judge": "rules", "identity": identity.digest, "inputs": identity.inputs},
            **{"cases": 1, "candidates": 2, "pairs": 1, "cases_with_pairs": 1, "dropped": {}},
            **{"green_best": 1.0, "green_worst": 0.0},
        )
        storage.write_json(storage.join(out, Preferences.FILE), made.model_dump(mode="json"))
        return made

    def compare(self, compared, data, out, experiment, split, progress):
        self.does("evaluate", out)
        identity = pipeline.request_of(compared, pipeline.Shards.open(data), split, experiment).identity
        estimate = Estimate(value=0.5, low=0.4, high=0.6, n=4)
        audit = Audit(
            **{"passed": True, "reasons": [], "warnings": [], "contrasts": {}, "distinct_reports": 1.0},
            **{"most_frequent_report": "", "most_frequent_share": 0.1, "overlooked": None, "laterality": None},
            **{"words": (1, 2, 3), "reference_words": (1, 2, 3), "cut_off": 0.0, "invalid": {}},
        )
        run = RunResult(metrics={"green": estimate}, audit=audit, findings=[], labels=[], regions=[], green=[0.5])
        results = Results(
            scored_by=pipeline.scoring(experiment).inputs,
            header=Header(
                **{"identity": identity.digest, "inputs": identity.inputs, "checkpoints": compared, "data": data},
                **{"split": split, "question": "?", "seed": 0, "prior": "", "histories": {}},
            ),
            **{"cases": 4, "judge": "rules", "truth": "", "notes": {}, "runs": dict.fromkeys(compared, run)},
            differences=[Difference(ours="dpo", theirs="sft", metrics={"green": estimate})],
        )
        storage.write_json(storage.join(out, METRICS), results.model_dump(mode="json"))
        return results

    def promote(self, checkpoint):
        self.did.append("register")
        version = tracking.register(artefacts.open_checkpoint(checkpoint), alias="champion")
        return type("Promotion", (), {"version": version, "alias": "champion"})

    def files(self):
        """Every file that a step made, with its content."""
        made = [path for path in self.out.rglob("*") if path.is_file() and "steps" not in path.parts]
        return {str(p.relative_to(self.out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in made}


class Stage:
    """A stage whose training is a number; its job is the real one."""

    def __init__(self, way, module):
        self.way, self.job_of, self.name = way, module.job_of, module.__name__.rpartition(".")[2]

    def run(self, data, out, experiment, init, progress):
        job = self.job_of(data, out, experiment, init)
        assert finished(job) is None, f"{self.name} was called though it is done"
        artefacts.claim(job.state, job.identity, "a stage")
        self.way.does(self.name, out)
        lineage = {"identity": job.identity.digest, "inputs": job.identity.inputs, "parent": init, "data": data}
        made = saved.checkpoint(out, experiment, float(next(self.way.numbers)), stage=self.name, **lineage)
        storage.delete(job.state)
        return made


@pytest.fixture
def way(empty_store, tmp_path, monkeypatch):
    (tmp_path / "runs.db").write_bytes(empty_store.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    return Way(tmp_path, monkeypatch)


def test_a_second_run_does_nothing_and_settings_of_the_execution_render_the_page_alone(way):
    first = way.run()
    assert way.did == FIRST
    before = way.files()
    assert way.run()["checkpoints"] == first["checkpoints"] and way.did == []
    again = way.run(*EXECUTION)
    assert way.did == [] and way.pages[-1] == 3
    assert again["checkpoints"] == first["checkpoints"] and again["seconds"] == first["seconds"]
    assert {name: digest for name, digest in way.files().items() if name != "summary.json"} == {
        name: digest for name, digest in before.items() if name != "summary.json"
    }


def test_another_configuration_goes_beside_and_the_first_is_found_again(way):
    first = way.run()
    before = way.files()
    second = way.run("sft.learning_rate=0.001")
    assert way.did == ["sft", "preferences", "dpo", "evaluate", "register"]
    places_ = {Path(uri).name for stage, uri in second["checkpoints"].items() if stage in ("sft", "dpo")}
    identities = {artefacts.open_checkpoint(second["checkpoints"][stage]).lineage.identity for stage in ("sft", "dpo")}
    assert {name.partition("-")[2] for name in places_} == identities
    assert second["checkpoints"]["contrastive"] == first["checkpoints"]["contrastive"]
    assert second["checkpoints"]["best"] == second["checkpoints"][second["registered"]["run"]]
    now = way.files()
    assert {name: now.get(name) for name in before if name != "summary.json"} == {
        name: digest for name, digest in before.items() if name != "summary.json"
    }
    back = way.run()
    assert way.did == ["register"]  # the champion is of the configuration that was run last
    assert back["checkpoints"] == first["checkpoints"] and tracking.registered() == first["checkpoints"]["best"]
    assert back["seconds"].keys() == first["seconds"].keys()


@pytest.mark.parametrize(
    ("override", "does"),
    [
        ("preferences.margin=0.2", ["preferences", "dpo", "evaluate", "register"]),
        ("dpo.beta=0.3", ["dpo", "evaluate", "register"]),
        ("evaluation.max_new_tokens=9", ["evaluate", "register"]),
        ("evaluation.bootstrap=200", ["evaluate", "register"]),
        ("model.tokenizer.top_k=4", ["sft", "preferences", "dpo", "evaluate", "register"]),
        ("model.vision.stem=linear", FIRST[1:]),
    ],
)
def test_a_setting_does_again_what_it_decides(way, override, does):
    way.run()
    way.run(override)
    assert way.did == does


def test_other_scores_of_the_same_reports_lie_at_the_same_place(way):
    way.run()
    way.run("evaluation.bootstrap=200")
    assert not list(way.out.glob("evaluation-*"))
    way.run("evaluation.max_new_tokens=9")
    assert len(list(way.out.glob("evaluation-*"))) == 1


def test_a_manifest_that_has_grown_is_gone_on_with_in_place(way):
    way.run()
    way.manifest.write_text("ten cases")
    way.cases = 10
    way.run()
    assert way.did == FIRST and not list(way.out.glob("shards-*"))
    way.manifest.write_text("eight cases")  # the shards hold ten now: what was told of eight is of the past
    way.cases = 8
    way.run()
    assert way.did[0] == "ingest"


def test_a_data_set_without_the_evaluations_split_is_refused_before_the_first_step(way):
    """CT-RATE as it was read failed at its evaluation, days later."""
    way.splits = ("train", "validation")
    with pytest.raises(UserError, match=r"no case in split test, .* there are train 1, validation 1: put cases"):
        way.run()
    assert way.did == []


def test_what_is_excluded_is_left_out_at_the_same_place(way):
    first = way.run()
    assert way.run("data.exclude=[case-1]")["checkpoints"] == first["checkpoints"]
    assert way.did == ["ingest"]


@pytest.mark.parametrize("step", ["ingest", "sft", "preferences", "dpo", "evaluate"])
def test_a_killed_run_goes_on_at_its_own_place(way, step):
    way.run()
    before = way.files()
    way.killed_in = step
    other = ["data.split.train=0.7", "data.split.test=0.1"]
    with pytest.raises(KeyboardInterrupt):
        way.run(*other)
    half = {name for name in way.files() if name.endswith("half")} - before.keys()
    with pytest.raises(KeyboardInterrupt):
        way.run(*other)
    assert {name for name in way.files() if name.endswith("half")} - before.keys() == half
    way.killed_in = None
    way.run(*other)
    assert way.did == FIRST[FIRST.index(step) :]
    way.run()
    assert way.did == ["register"]
    now = way.files()
    assert {name for name in before if now.get(name) != before[name]} <= {"summary.json"}


def test_sft_trained_again_under_the_same_configuration_makes_its_pairs_anew(way):
    first = way.run()
    artefacts.discard(first["checkpoints"]["sft"])
    second = way.run()
    assert way.did == ["sft", "preferences", "dpo", "evaluate", "register"]
    assert second["checkpoints"]["sft"] == first["checkpoints"]["sft"]
    assert second["checkpoints"]["dpo"] != first["checkpoints"]["dpo"]
    assert storage.exists(first["checkpoints"]["dpo"])


def test_what_no_pipeline_made_stays_and_the_result_goes_beside(way):
    """Shards ingested by hand into the --out of a pipeline of another spec were gone."""
    theirs = way.out / "shards" / "train.parquet"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("terabytes")
    way.run()
    assert len(list(way.out.glob("shards-*/shards.json"))) == 1
    way.run(fresh=True)
    assert way.did == FIRST
    pipeline.clear(str(way.out))
    assert [path for path in way.out.rglob("*") if path.is_file()] == [theirs]
    assert theirs.read_text() == "terabytes"


def test_a_fresh_start_takes_the_alias_from_what_it_removes(way):
    way.run()
    way.run("sft.learning_rate=0.001")
    assert tracking.aliases()
    pipeline.clear(str(way.out))
    assert tracking.aliases() == {}


def test_a_place_is_the_first_ones_for_good(tmp_path):
    out, plain = str(tmp_path), str(tmp_path / "sft")
    assert places.Places.open(out).take(plain, "a") == plain
    assert places.Places.open(out).take(plain, "b") == f"{plain}-b"
    assert places.Places.open(out).take(plain, "a") == plain
    storage.write_bytes(str(tmp_path / "dpo.state" / "half"), b"")
    assert places.Places.open(out).take(str(tmp_path / "dpo"), "a").endswith("dpo-a")  # somebody trains there


def test_a_mistyped_manifest_removes_nothing(way):
    """`--fresh` deleted every stage, and then said that there is no such manifest."""
    way.run()
    before = way.files()
    way.manifest.unlink()
    with pytest.raises(UserError, match=r"manifest\.jsonl is not there"):
        way.run(fresh=True)
    assert way.files() == before


def test_what_the_last_run_used_is_not_listed_for_cleaning(way):
    """The demo took its scans before the run was counted as begun: `clean --yes` deleted them."""
    begun = pipeline.Pipeline(str(way.out), config.load("tiny"), lambda *_: None)
    scans = begun.place(storage.join(str(way.out), "scans"), artefacts.Identity.of({"seed": 0}))
    begun.places.finished(begun.started)
    assert scans not in places.Places.open(str(way.out)).unused()


def shaped_as_ct_rate(folder):
    """Phantoms in CT-RATE's folders under its names, with its three tables: 18 training and 6 `valid` patients."""
    rows = [json.loads(line) for line in Path(phantom.write(str(folder / "raw"), 24, 0)).read_text().splitlines()]
    tables = {"reports": [], "metadata": [], "labels": []}
    for number, row in enumerate(rows, 1):
        part = "train" if number <= 18 else "valid"
        study = f"{part}_{number}_a"
        volume = folder / "dataset" / part / f"{part}_{number}" / study / f"{study}_1.nii.gz"
        volume.parent.mkdir(parents=True)
        (folder / "raw" / row["volume"]).rename(volume)
        tables["reports"].append(
            {"VolumeName": volume.name, "Findings_EN": row["report"], "Impressions_EN": "Not given."}
        )
        tables["metadata"].append({"VolumeName": volume.name, "RescaleSlope": 1, "RescaleIntercept": -1024})
        tables["labels"].append({"VolumeName": volume.name, **green.labels(row["report"])})
    for name, each in tables.items():
        with (folder / "dataset" / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, each[0])
            writer.writeheader()
            writer.writerows(each)
    return str(folder / "dataset")


@pytest.mark.slow
def test_a_folder_of_ct_rate_is_ingested_and_evaluated_on_its_valid_cases(ray_cluster, way, tmp_path, monkeypatch):
    evaluated = []

    def compare(compared, data, out, experiment, split, progress):
        evaluated.extend(case.id for case in pipeline.Shards.open(data).cases(split))
        return way.compare(compared, data, out, experiment, split, progress)

    for name, real in {"read_manifest": read_manifest, "ingest": ingest, "compare": compare}.items():
        monkeypatch.setattr(pipeline, name, real)
    folder = shaped_as_ct_rate(tmp_path)
    source = pipeline.Source(folder, folder, "ct-rate")
    ingested = pipeline.run(config.load("tiny"), str(way.out), source, lambda *_: None)["ingest"]
    assert ingested["splits"]["test"] == 6 and ingested["splits"]["validation"] > 0 and ingested["rejected"] == {}
    assert sum(ingested["splits"].values()) == 24
    assert sorted(evaluated) == [f"valid_{number}_a_1" for number in range(19, 25)]
    assert way.did == FIRST[1:]
