"""A local HF model as judge: a tiny one, made here."""

from pathlib import Path

import pytest
import torch
from green_server import answered
from tiny_judge import save
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mu2llm.errors import UserError
from mu2llm.green import load_judge, local
from mu2llm.green.local import LocalWriter
from mu2llm.green.prompted import Unanswered
from mu2llm.settings.green import JudgeConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("tiny-judge"))


PROMPTS = [
    "no effusion",
    "left nodule in the lung . " * 9,
    "right",
    "the lung : 2 , 3 nodule in the left lung",
    "no " * 40,
]


def test_batched_answers_are_those_of_one_by_one(folder):
    batched = answered(LocalWriter(str(folder), batch_size=3, max_new_tokens=12), PROMPTS)
    alone = LocalWriter(str(folder), batch_size=1, max_new_tokens=12)
    assert batched == [answered(alone, [prompt])[0] for prompt in PROMPTS]
    assert len(set(batched)) > 1 and all(isinstance(answer, str) and answer for answer in batched)


def test_an_answer_is_only_what_is_new(folder):
    (answer,) = answered(LocalWriter(str(folder), 1, 5), ["left nodule in the lung"])
    assert isinstance(answer, str) and len(answer.split()) <= 5


def test_a_prompt_without_room_is_unanswered(folder):
    fits, not_so = answered(LocalWriter(str(folder), 2, 20), ["no effusion", "no " * 290])
    assert isinstance(fits, str)
    assert isinstance(not_so, Unanswered) and "300" in not_so.why


def test_the_chat_template_is_the_models_own(folder):
    writer = LocalWriter(str(folder), 1, 4)
    assert writer._chat("hello") == "<|user|>\nhello</s>\n<|assistant|>\n"
    writer._tokenizer.chat_template = "{% for m in messages %}{{ m['from'] + ': ' + m['value'] }}{% endfor %}"
    assert writer._chat("hello") == "human: hello"
    writer._tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    assert writer._chat("hello") == "user: hello"


def test_its_identity_names_the_weights(folder, tmp_path):
    one = LocalWriter(str(folder), 1, 4).identity
    assert one == LocalWriter(str(folder), 8, 4).identity != LocalWriter(str(folder), 1, 5).identity
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    assert LocalWriter(str(tmp_path), 1, 4).identity.partition("@")[2] != one.partition("@")[2]


def test_no_weights_are_loaded_for_its_identity(folder, monkeypatch):
    """A driver loaded the whole model to name it."""
    named = LocalWriter(str(folder), 8, 4).identity
    monkeypatch.setattr(local.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert local.identity(str(folder), 4) == named
    with pytest.raises(UserError, match="judge hf:"):
        local.identity(f"{folder}/gone", 4)


def test_a_model_in_several_files_has_an_identity_too(folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and "@" in local.identity(str(tmp_path), 4)


def test_a_random_model_gives_invalid_judgements_once(folder, tmp_path):
    config = JudgeConfig(name=f"hf:{folder}", batch_size=2, max_new_tokens=8, cache=str(tmp_path))
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{reference} : {candidate}")
    judge = load_judge(config.model_copy(update={"prompt": str(prompt)}))
    judgements = judge.judge([("no effusion", "the effusion"), ("", "x"), ("no effusion", "the effusion")])
    assert [j.valid for j in judgements] == [False] * 3
    assert all(j.judge == judge.identity and j.why for j in judgements)


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="judge hf:"):
        LocalWriter(str(tmp_path / "gone"), 1, 4)
