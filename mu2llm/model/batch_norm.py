"""Batch norm over the batch of all workers, on any backend: torch's own SyncBatchNorm is for GPUs alone."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collective
from torch import Tensor, nn

from mu2llm.model.initialisation import Statistics


class BatchNorm3d(Statistics, nn.BatchNorm3d):
    """Synchronised batch norm: several workers normalise by the statistics of their whole batch, with the gradient."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, K, H, W), where the workers' B may differ → the same shape"""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        x = input.float().movedim(1, -1)
        own = x.flatten(0, -2)
        sums = collective.all_reduce(torch.cat([own.sum(0), own.new_tensor([len(own)])]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        variance = collective.all_reduce((own - mean).square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return ((x - mean) * scale + self.bias).movedim(-1, 1).to(input.dtype)
