"""One owner of device and precision: what runs where, and in which numbers."""

import copy

import pytest
import torch
from small_runs import case, least

from mu2llm import config
from mu2llm.engine.decoder import ContinuousDecoder, Prompt
from mu2llm.engine.features import scan_features
from mu2llm.engine.loading import load, load_encoder, numerics, place
from mu2llm.engine.sampling import Decoding
from mu2llm.errors import UserError
from mu2llm.model import build
from mu2llm.settings.inference import InferenceConfig


@pytest.fixture(scope="module")
def model():
    settings = least()
    return build(settings.model, settings.data.spec, [case(i).report for i in range(6)], 0)


@pytest.fixture(scope="module")
def inputs(model):
    generator = torch.Generator().manual_seed(0)
    voxels = torch.randint(0, 256, (2, *least().data.spec.shape), dtype=torch.uint8, generator=generator)
    return {
        **{"volumes": voxels, "chunk_mask": torch.tensor([[True, True], [True, False]])},
        **model[1].encode(["Write."] * 2, ["The liver is normal.", "No nodule."]),
    }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gives_the_numbers_of_a_training_step_at_half_the_memory(model, inputs, precision):
    """DPO's reference was fp32 and its policy bf16, so rewards did not start at 0."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    trained = model[0].eval()
    with torch.autocast("cpu", dtype), torch.no_grad():  # with gradients torch takes other kernels
        expected = trained(**inputs)
    placed = place(copy.deepcopy(trained), precision, "cpu")
    with numerics(placed.device, precision):
        output = placed(**inputs)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    assert not torch.equal(trained(**inputs).logits, expected.logits.float())
    layer = placed.model.language_model.layers[0]
    assert layer.self_attn.q_proj.weight.dtype == dtype
    assert placed.lm_head.weight.dtype == layer.input_layernorm.weight.dtype == torch.float32  # tied to the embedding
    assert all(buffer.dtype != dtype for buffer in placed.buffers())


def test_fp32_is_the_model_as_it_is(model, inputs):
    with torch.no_grad():
        expected = model[0].eval()(**inputs).logits
    placed = place(copy.deepcopy(model[0]), "fp32", "cpu")
    with numerics(placed.device, "fp32"):
        assert torch.equal(placed(**inputs).logits, expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_token_that_is_written_in_half_precision_is_as_likely_as_fp32s_best(checkpoints, precision):
    spec, written = least().data.spec, {}
    rows = {"voxels": torch.zeros(1, *spec.shape).numpy(), "chunk_mask": torch.ones(1, spec.chunks).bool().numpy()}
    for each in ("fp32", precision):
        model, processor = load(checkpoints["sft"], each)
        features, mask = scan_features(model, rows, each)
        decoder = ContinuousDecoder(model, processor, each)
        (sequence,) = decoder.join(features, mask, [Prompt("Write.", "a", Decoding(8))])
        for _ in range(7):
            decoder.step()
        written[each] = sequence.ids
    exact, processor = load(checkpoints["sft"])
    prompt = processor.encode(["Write."])
    ids = torch.cat([prompt["input_ids"], torch.tensor([written[precision]])], dim=1)
    scan = {"vision_features": scan_features(exact, rows)[0], "chunk_mask": mask}
    asked = {name: prompt[name] for name in ("question_ids", "question_mask")}
    likely = exact(input_ids=ids, **scan, **asked).logits[0].log_softmax(-1)[-9:-1]
    short = likely.amax(-1) - likely[torch.arange(8), written[precision]]
    assert len(written[precision]) == 8 and short.max() < 0.02 < likely.std(-1).min()


def test_device_and_precision_follow_what_an_actor_gets():
    plain = InferenceConfig()
    assert (plain.used_device, plain.used_precision) == ("cpu", "fp32")
    gpu = InferenceConfig(gpus_per_actor=0.5)
    assert (gpu.used_device, gpu.used_precision) == ("cuda", "bf16")
    assert InferenceConfig(gpus_per_actor=1, precision="fp32").used_precision == "fp32"
    laptop = InferenceConfig(gpus_per_actor=1, device="cpu")
    assert (laptop.used_device, laptop.used_precision) == ("cpu", "fp32")


def test_presets_on_gpus_write_on_gpus_and_those_on_cpus_in_fp32():
    """Evaluation of the paper's preset was one CPU core; candidates took what a DPO worker gets."""
    for preset in ("paper", "llama3-1b", "qwen3-1.7b"):
        experiment = config.load(preset)
        for settings in (experiment.evaluation, experiment.preferences, experiment.serving.inference):
            assert (settings.used_device, settings.used_precision) == ("cuda", "bf16")
        assert experiment.evaluation.actors == experiment.sft.workers
        assert experiment.dpo.inference().used_precision == experiment.dpo.precision
    for preset in ("tiny", "demo", "sweep", "smollm2"):
        experiment = config.load(preset)
        assert experiment.evaluation.used_precision == experiment.preferences.used_precision == "fp32"
        assert experiment.preferences.cpus_per_actor == experiment.dpo.cpus_per_worker


def test_a_gpu_that_is_not_there_is_said_and_nothing_runs_elsewhere(checkpoints, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"sees none: .*evaluation\.device=cpu"):
        load_encoder(checkpoints["sft"], "bf16", "cuda")
