"""Batch norm over the batch of all workers: two processes normalise, and learn, as one does with both batches."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mu2llm.model.batch_norm import BatchNorm3d

SHARES = (slice(0, 3), slice(3, 8))  # of unequal size


def data():
    generator = torch.Generator().manual_seed(0)
    shape = (8, 5, 2, 3, 4)
    return 3 + 2 * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def result(norm, x, weight):
    """The output, and the gradients of Σ output · weight."""
    x = x.clone().requires_grad_()
    out = norm.train()(x)
    (out * weight).sum().backward()
    return out.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var


def worker(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x, weight = data()
    results.put((rank, [each.numpy() for each in result(BatchNorm3d(5), x[SHARES[rank]], weight[SHARES[rank]])]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_are_one(tmp_path):
    out, gradient, *parameters, mean, variance = result(nn.BatchNorm3d(5), *data())
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=worker, args=(rank, tmp_path / "store", results)) for rank in (0, 1)]
    for each in workers:
        each.start()
    parts = dict(results.get(timeout=120) for _ in workers)
    for each in workers:
        each.join(60)
    parts = [[torch.from_numpy(each) for each in parts[rank]] for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, atol=1e-5, rtol=1e-4)
    for i, whole in enumerate(parameters):
        torch.testing.assert_close(parts[0][2 + i] + parts[1][2 + i], whole, atol=1e-4, rtol=1e-4)
    for part in parts:
        torch.testing.assert_close(part[4], mean)
        torch.testing.assert_close(part[5], variance)


def test_alone_it_is_torchs_own():
    for ours, theirs in zip(result(BatchNorm3d(5), *data()), result(nn.BatchNorm3d(5), *data()), strict=True):
        assert torch.equal(ours, theirs)
