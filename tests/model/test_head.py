"""The head in pieces: the numbers of all logits at once, in less memory."""

import pytest
import torch
import torch.nn.functional as F
from small_models import QUESTION, TEXTS, make, scans
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from mu2llm.engine.log_probabilities import divergences, sequence_logps
from mu2llm.model import add_lora, head
from mu2llm.settings.model import LoraSettings


@pytest.fixture
def in_pieces(monkeypatch):
    """Two positions at a time, of a vocabulary of 320."""
    monkeypatch.setattr(head, "MOST_LOGITS", 700)


def given(double=True):
    model, processor = make()
    inputs = processor.encode([QUESTION] * 2, TEXTS)
    return model.double() if double else model, {**inputs, "volumes": scans(2)}


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_the_loss_and_its_gradients_are_those_of_all_logits(in_pieces):
    model, inputs = given()
    output = model(**inputs)
    logits, labels = output.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    expected = F.cross_entropy(logits, labels, ignore_index=-100)
    torch.testing.assert_close(output.loss, expected, atol=1e-10, rtol=1e-10)
    over_items = model(**inputs, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(over_items, F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / 7)
    expected.backward()
    of_all = gradients(model)
    model(**inputs, skip_logits=True).loss.backward()
    torch.testing.assert_close(gradients(model), of_all, atol=1e-10, rtol=1e-8)


def test_bf16_loses_what_it_did(in_pieces):
    model, inputs = given(double=False)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    labels = inputs["labels"][:, 1:].flatten()
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=-100)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, atol=1e-6, rtol=1e-6)


def test_training_makes_no_logits_and_the_head_sees_answers_only(in_pieces):
    model, inputs = given()
    rows = []
    model.lm_head.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[0]))
    assert model.train()(**inputs).logits is None
    answers = int((inputs["labels"][:, 1:] != -100).sum())
    assert sum(rows) == answers < inputs["labels"].numel() and max(rows) == 2


def test_log_probabilities_and_divergence_are_those_of_all_logits(in_pieces):
    model, inputs = given()
    reference, _ = make(seed=1)
    labels = inputs.pop("labels")
    pair = {**inputs, "completion_mask": (labels != -100).long()}
    with torch.no_grad():
        ours, theirs = (each(**inputs).logits[:, :-1].log_softmax(-1) for each in (model, reference.double()))
    answers, tokens = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
    each = ours.gather(-1, tokens[..., None]).squeeze(-1) * answers
    torch.testing.assert_close(sequence_logps(model, pair), each.sum(1), atol=1e-10, rtol=1e-10)
    expected = float((ours.exp() * (ours - theirs)).sum(-1)[answers].sum())
    adapted = add_lora(model, LoraSettings(r=2))  # whose adapter does nothing yet
    for policy in (model, adapted.eval()):
        total, count = divergences(policy, reference, {**inputs, "labels": labels})
        assert total == pytest.approx(expected, rel=1e-8) and count == int(answers.sum())


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Linear(32, 32768, bias=False)

    def forward(self, hidden, labels):
        return head.next_token_logps(hidden, labels, self.table)


def test_pieces_take_less_memory(monkeypatch):
    def peak(most):
        monkeypatch.setattr(head, "MOST_LOGITS", most)
        with FakeTensorMode():
            hidden, model = torch.empty(2, 1024, 32, requires_grad=True), Head()
            labels = torch.zeros(2, 1024, dtype=torch.long)
            tracker = MemTracker()
            with tracker:
                model(hidden, labels).sum().backward()
        return sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())

    assert peak(2**22) < 0.2 * peak(2**30)
