"""Text and scans to model inputs."""

from datetime import datetime

import numpy as np
import pytest
import torch
from small_models import QUESTION, TEXTS, make

from mu2llm import ct
from mu2llm.ct import phantom
from mu2llm.errors import UserError
from mu2llm.model import Mu2Processor, load
from mu2llm.records import Checkpoint, Lineage


@pytest.fixture(scope="module")
def processor():
    return make()[1]


def test_the_prompt_has_one_placeholder_and_ends_where_the_answer_begins(processor):
    prompt = processor.prompt(QUESTION)
    assert prompt.count("<volume>") == 1 and QUESTION in prompt
    ids, answer = processor.token_ids(QUESTION, TEXTS[0])
    assert processor.tokenizer.decode(ids) == prompt.replace("<volume>", "<volume>" * 4)
    assert processor.tokenizer.decode(answer) == TEXTS[0] + processor.tokenizer.eos_token


def test_generation_continues_what_training_saw(processor):
    trained = processor.encode([QUESTION], [TEXTS[0]])
    asked = processor.encode([QUESTION])
    length = asked["input_ids"].shape[1]
    assert torch.equal(trained["input_ids"][:, :length], asked["input_ids"])
    assert (trained["labels"][:, :length] == -100).all() and (trained["labels"][:, length:] >= 0).all()


def test_pads_for_training_on_the_right_and_for_generation_on_the_left(processor):
    questions = ["Effusion?", QUESTION]
    trained, asked = processor.encode(questions, TEXTS), processor.encode(questions)
    assert trained["attention_mask"][:, 0].all() and not trained["attention_mask"][:, -1].all()
    assert asked["attention_mask"][:, -1].all() and not asked["attention_mask"][:, 0].all()
    assert "labels" not in asked
    assert (trained["labels"][trained["attention_mask"] == 0] == -100).all()


def test_any_text_survives_the_small_tokenizer(processor):
    for text in ("Größe 5 µm — ½", "左肺", "a\n\tb  c", "\x00\x7f"):
        _, ids = processor.token_ids(QUESTION, text)
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_placeholder_inside_a_question_is_not_one(processor):
    with pytest.raises(UserError, match=r"2 placeholders <volume>, expected 1"):
        processor.encode(["What is <volume>?"])
    _, answer = processor.token_ids(QUESTION, "Say <volume></s>.")
    assert answer.count(processor.tokenizer.eos_token_id) == 1
    assert processor.tokenizer.convert_tokens_to_ids("<volume>") not in answer


def test_too_long_a_text_is_refused_by_number(processor):
    with pytest.raises(UserError, match=r"a text of \d+ tokens; the model takes 128"):
        processor.encode([QUESTION], ["effusion " * 200])


def test_calls_with_prompt_chat_or_questions_say_the_same(processor):
    voxels = np.zeros(processor.spec.shape, np.uint8)
    chat = [{"role": "user", "content": [{"type": "volume"}, {"type": "text", "text": QUESTION}]}]
    asked = [
        processor(text=processor.prompt(QUESTION), volumes=voxels, return_tensors="pt"),
        processor(text=chat, volumes=voxels),
        processor(text=[chat], images=[voxels]),
        processor(questions=QUESTION, volumes=voxels),
    ]
    for given in asked:
        assert given["volumes"].shape == (1, *processor.spec.shape) and given["chunk_mask"].all()
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(given[name], asked[0][name])
    assert torch.equal(asked[1]["question_ids"], asked[3]["question_ids"])


def test_a_text_without_the_placeholder_is_refused(processor):
    with pytest.raises(UserError, match=r"0 placeholders <volume>, expected 1"):
        processor(text=QUESTION, volumes=np.zeros(processor.spec.shape, np.uint8))


def test_scans_come_as_files_volumes_and_voxels(processor, tmp_path):
    made = phantom.make(0, 0)
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(made.nifti())
    volume = ct.CTVolume(made.hu, made.affine)
    expected = ct.prepare(volume, processor.spec)
    inputs = processor.prepare([str(path), path.read_bytes(), volume, expected, expected.voxels])
    for voxels in inputs["volumes"]:
        assert np.array_equal(voxels.numpy(), expected.voxels)


def test_voxels_of_another_shape_are_refused(processor):
    with pytest.raises(UserError, match=r"\(2, 1, 4, 8, 8\); spec least has \(2, 1, 4, 16, 16\)"):
        processor(questions=QUESTION, volumes=np.zeros((2, 1, 4, 8, 8), np.uint8))


def test_a_scan_prepared_by_another_spec_is_refused_by_both_hashes(processor):
    other = processor.spec.model_copy(update={"windows": ((-120, 220),)})
    prepared = ct.prepare(ct.CTVolume(phantom.make(0, 0).hu, np.eye(4)), other)
    assert prepared.voxels.shape == processor.spec.shape
    with pytest.raises(UserError, match=rf"{other.hash}.*expects least \({processor.spec.hash}\)"):
        processor.prepare(prepared)


def test_what_is_no_ct_is_refused_or_accepted_on_request(processor):
    values = np.random.default_rng(0).gamma(2, 150, (9, 9, 9)).astype(np.int16)
    mr = ct.CTVolume(values, np.eye(4), warnings=("not_hu",))
    with pytest.raises(ct.Rejection) as rejected:
        processor.prepare(mr)
    assert rejected.value.reason == "not_hu"
    assert processor.prepare(mr, accept=("not_hu",))["volumes"].shape == (1, *processor.spec.shape)
    assert processor(questions=QUESTION, volumes=mr, accept=("not_hu",))["volumes"].shape[0] == 1


LLAMA_3_2 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- endif %}{%- endif %}Today Date: {{ date_string }}\n{{ messages[0]['content'] }}"
)


@pytest.mark.parametrize("template", [LLAMA_3_2, "{{ strftime_now('%d %b %Y') }}{{ messages[0]['content'] }}"])
def test_a_prompt_is_of_no_day(tmp_path, template):
    """Llama-3.2's template, and SmolLM3's, write today's date: a checkpoint would read another prompt each day."""
    _, processor = make()
    processor.chat_template = template
    prompt = processor.prompt(QUESTION)
    assert "26 Jul 2024" in prompt and datetime.now().strftime("%Y") not in prompt.replace("2024", "")
    assert processor.apply_chat_template([{"role": "user", "content": f"<volume>{QUESTION}"}]) == prompt
    processor.prompt_date = "2025-03-02"
    assert "02 Mar 2025" in processor.prompt(QUESTION)
    processor.save_pretrained(tmp_path)
    read = Mu2Processor.from_pretrained(tmp_path)
    assert read.prompt(QUESTION) == processor.prompt(QUESTION) and read.prompt_hash == processor.prompt_hash
    read.prompt_date = "2025-03-03"
    assert read.prompt_hash != processor.prompt_hash


def test_a_template_s_other_variables_are_saved_and_used(tmp_path):
    _, processor = make()
    processor.chat_template = "{{ 'think ' if enable_thinking else '' }}{{ messages[0]['content'] }}"
    thinking = processor.prompt_hash
    processor.template_variables = {"enable_thinking": True}
    assert processor.prompt(QUESTION).startswith("think ") and processor.prompt_hash != thinking
    processor.save_pretrained(tmp_path)
    assert Mu2Processor.from_pretrained(tmp_path).prompt(QUESTION) == processor.prompt(QUESTION)


def test_a_checkpoint_whose_prompt_has_changed_is_refused(tmp_path):
    model, processor = make()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    lineage = Lineage(stage="sft", spec_hash=processor.spec.hash, prompt=processor.prompt_hash)
    described = Checkpoint(uri=str(tmp_path), experiment={}, lineage=lineage)
    (tmp_path / Checkpoint.FILE).write_text(described.model_dump_json())
    load(str(tmp_path))
    processor.chat_template = "Another: " + processor.tokenizer.chat_template
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"trained on prompts of {lineage.prompt}.* now writes"):
        load(str(tmp_path))


@pytest.mark.parametrize("kind", ["volume", "image"])
def test_chats_are_rendered_as_by_any_processor(processor, kind):
    chat = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": QUESTION}]}]
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert rendered == processor.prompt(QUESTION)
    assert processor.apply_chat_template([chat, chat]) == [rendered, rendered]
    answered = [*chat, {"role": "assistant", "content": "Normal."}]
    assert processor.apply_chat_template(answered, add_generation_prompt=False).endswith("Normal.")
    voxels = np.zeros(processor.spec.shape, np.uint8)
    inputs = processor.apply_chat_template(chat, tokenize=True, volumes=voxels)
    expected = processor(questions=QUESTION, volumes=voxels)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_a_checkpoints_own_placeholder_stands_for_the_scan_in_chats_too():
    _, processor = make()
    processor.volume_token = "<user>"  # any token that is one id
    processor.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    chat = [{"role": "user", "content": [{"type": "volume"}, {"type": "text", "text": QUESTION}]}]
    assert processor.apply_chat_template(chat) == f"<user>{QUESTION}"
    inputs = processor(text=chat, volumes=np.zeros(processor.spec.shape, np.uint8))
    assert torch.equal(inputs["question_ids"], processor(questions=QUESTION)["question_ids"])
