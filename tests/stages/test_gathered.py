"""The contrastive loss over several processes: their gradients are those of one with the whole batch."""

import socket

import pytest
import torch
from gloo import SERVER

from mu2llm import weights
from mu2llm.config import load
from mu2llm.model import build_contrastive

SENTENCES = ["There is a nodule.", "There is an effusion.", "There is a cyst.", "There is a nodule.", "No finding."]
OWNER = [0, 0, 1, 2, 3]
SHARES = [(3, 4), (1, 1)]  # scans and texts of each process


def batch(loss):
    """A model in float64 with a text encoder of its own, and the whole batch; the same in each process."""
    settings = load("tiny", [f"contrastive.loss={loss}", "model.vision.stem=linear", "model.vision.num_layers=1"])
    torch.manual_seed(0)
    encoder = weights.text_encoder("small", SENTENCES)
    spec = settings.data.spec
    model = build_contrastive(settings.model, spec, settings.contrastive, encoder.width, None, 0, encoder)
    words = encoder.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    scans = torch.rand(4, *spec.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, spec.chunks, dtype=torch.bool)
    return model.double().eval(), {"volumes": scans, "chunk_mask": mask}, words, torch.tensor([0, 1, 2, 0, 3])


def texts(words, keys, some, first=0):
    owner = torch.tensor(OWNER)[some] - first
    return {"text_ids": words.input_ids[some], "text_mask": words.attention_mask[some], "text_keys": keys[some]} | {
        "owner": owner
    }


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def work(loss, rank, port, folder):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from mu2llm.stages.steps import gather

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, scans, words, keys = batch(loss)
    before, of_texts = (sum(each[i] for each in SHARES[:rank]) for i in (0, 1))
    own = slice(before, before + SHARES[rank][0])
    given = {name: tensor[own] for name, tensor in scans.items()}
    given |= texts(words, keys, slice(of_texts, of_texts + SHARES[rank][1]), before)
    trained = DistributedDataParallel(model)
    output = trained(**given, gather=gather)
    output.loss.backward()
    found = {"loss": output.loss.detach(), "shape": output.logits.shape, "gradients": gradients(model)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
def test_each_process_scores_its_own_scans_and_learns_what_one_does(loss, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [SERVER.Process(target=work, args=(loss, rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    model, scans, words, keys = batch(loss)
    whole = model(**scans, **texts(words, keys, slice(None)))
    whole.loss.backward()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [tuple(each["shape"]) for each in found] == [(4, 3), (4, 1)]  # four texts are distinct
    torch.testing.assert_close(sum(each["loss"] for each in found) / 2, whole.loss.detach())
    expected = gradients(model)
    assert any("text_encoder" in name for name in expected)
    for each in found:
        for name, gradient in expected.items():
            torch.testing.assert_close(each["gradients"][name], gradient, atol=1e-12, rtol=1e-9)
