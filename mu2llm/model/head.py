"""What the language model's head gives of an answer, without the logits of all positions at one time.

In fp32 the logits of 1,280 positions over Llama-3.2's vocabulary are 0.66 GB, and autograd keeps them twice. Only the
answer's positions go through the head, and above `MOST_LOGITS` in pieces that the backward pass computes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils.import_utils import is_tracing

IGNORED = -100
MOST_LOGITS = 2**25


def shapes_only(x: Tensor) -> bool:
    """Whether there are no values to look at: on the meta device, or while a graph is traced."""
    return bool(x.is_meta or is_tracing(x))


def next_token_logps(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    """Last hidden states (R, L, E), labels (R, L), −100 where there is no answer → (R, L − 1), each next token's
    log-probability in nats, in fp32 or finer; 0 where there is no answer."""
    hidden, labels = hidden[:, :-1], labels[:, 1:]
    answers = labels != IGNORED
    if shapes_only(answers):  # how many there are, nobody knows there
        every = torch.cat([*_pieces(_logps, head, hidden.flatten(0, 1), labels.flatten().clamp(min=0))])
        return every.view_as(labels) * answers
    rows = answers.flatten().nonzero().squeeze(1)  # the one wait for the GPU
    parts = (hidden.flatten(0, 1).index_select(0, rows), labels.flatten().index_select(0, rows))
    some = torch.cat([*_pieces(_logps, head, *parts)])
    return some.new_zeros(labels.numel()).index_copy(0, rows, some).view_as(labels)


@torch.no_grad()
def divergence(ours: Tensor, theirs: Tensor, labels: Tensor, our_head: nn.Linear, their_head: nn.Linear) -> Tensor:
    """Of two models' last hidden states (R, L, E) the sum over the answers' tokens of KL(ours ‖ theirs), in nats."""
    answers = labels[:, 1:] != IGNORED

    def each(ours: Tensor, theirs: Tensor, head: nn.Linear) -> Tensor:
        log_p, log_q = _logits(ours, head).log_softmax(-1), _logits(theirs, their_head).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    parts = _pieces(each, our_head, ours[:, :-1][answers], theirs[:, :-1][answers])
    return torch.cat([*parts]).sum()


def _pieces(function: Callable[..., Tensor], head: nn.Linear, *rows: Tensor) -> Iterator[Tensor]:
    """The function on so many rows (n, …) at a time that their logits are few; what it keeps for the backward pass is
    then computed again there."""
    at_a_time = max(1, MOST_LOGITS // head.out_features)
    if len(rows[0]) <= at_a_time:
        yield function(*rows, head)
        return
    for part in zip(*(each.split(at_a_time) for each in rows), strict=True):
        yield checkpoint(function, *part, head, use_reentrant=False, preserve_rng_state=False)


def _logits(hidden: Tensor, head: nn.Linear) -> Tensor:
    logits: Tensor = head(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logps(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    logits = _logits(hidden, head)
    return logits.gather(-1, labels[:, None]).squeeze(-1) - logits.logsumexp(-1)
