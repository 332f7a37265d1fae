"""The language model alone: other programs load it, and what it says of text is what the checkpoint says."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mu2llm.artefacts import open_checkpoint
from mu2llm.cli import app
from mu2llm.errors import UserError
from mu2llm.evaluation.exports.language_model import language_model
from mu2llm.model import load


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("lm") / "lm"
    return out, language_model(checkpoints["sft"], str(out))


def test_text_alone_has_equal_logits(checkpoints, exported):
    whole, processor = load(checkpoints["sft"])
    alone, tokenizer = (each.from_pretrained(exported[0]) for each in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("Findings: There is a large left pleural effusion.", return_tensors="pt")["input_ids"]
    assert (
        ids.tolist()
        == processor.tokenizer("Findings: There is a large left pleural effusion.", return_tensors="pt")[
            "input_ids"
        ].tolist()
    )
    with torch.no_grad():
        torch.testing.assert_close(alone(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=0, atol=0)
    for name in ("eos_token_id", "pad_token_id"):
        assert getattr(alone.generation_config, name) == getattr(whole.generation_config, name)
    assert tokenizer.chat_template == processor.chat_template


def test_a_prompt_of_visual_tokens_has_equal_logits(checkpoints, exported):
    """What a server that takes prompts as embeddings is given in place of `<volume>`."""
    whole, processor = load(checkpoints["sft"])
    alone = AutoModelForCausalLM.from_pretrained(exported[0])
    batch = processor.encode(["Write the report."])
    visual = torch.randn(1, processor.queries, whole.config.text.hidden_size)
    with torch.no_grad():
        expected = whole(input_ids=batch["input_ids"], visual_tokens=visual).logits
        embeddings = alone.get_input_embeddings()(batch["input_ids"])
        here = batch["input_ids"] == whole.config.volume_token_id
        embeddings[here] = visual[0]
        torch.testing.assert_close(alone(inputs_embeds=embeddings).logits, expected)


def test_it_is_a_plain_causal_model(exported):
    out, told = exported
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "auto_map" not in config and told["architecture"] == "LlamaForCausalLM"
    assert told["served_model_name"].startswith("mu2llm-sft-")
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in out.iterdir()
    }
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names and all(name.split(".")[0] in ("model", "lm_head") for name in names)
    assert not [name for name in names if "vision" in name or "mu2_tokenizer" in name or "lora" in name]


def test_a_checkpoint_without_a_language_model(checkpoints, tmp_path, exported):
    with pytest.raises(UserError, match="not a checkpoint"):
        language_model(str(tmp_path), str(tmp_path / "out"))
    command = ["export", "lm", "--checkpoint", checkpoints["dpo"], "--out", str(tmp_path / "lm"), "--json"]
    told = json.loads(CliRunner().invoke(app, command).stdout)
    assert told["parameters"] > 0 and open_checkpoint(checkpoints["dpo"])
