"""Cross-entropy at target positions, without ever holding a whole batch's logits in float32.

For logits z and target y: CE = logsumexp(z) - z[y]. Label smoothing (Szegedy et al. 2016, arXiv:1512.00567)
optimises (1 - eps) * CE + eps * mean over v of -log p(v), and the mean is logsumexp(z) - mean(z).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

CHUNK = 1024
"""Target positions whose float32 logits exist at one time."""


def summed_losses(
    head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, *, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Objective and cross-entropy, each summed over the targets.

    Args:
        head: frozen output projection, hidden size to vocabulary.
        hidden: [N, hidden] final hidden states at the target positions.
        targets: int64 [N] token ids.
        smoothing: eps above.

    Returns:
        float32 scalars: what is differentiated, and the pure cross-entropy in nats (no gradient).
    """
    objective, nll = _SummedLosses.apply(hidden, head, targets, smoothing)
    return objective, nll


class _SummedLosses(torch.autograd.Function):  # type: ignore[misc]
    """Takes the gradient while a chunk's logits are there: they are computed once, turned into their own gradient in
    place, and are gone before the next chunk's come (as in Liger's fused linear cross-entropy, arXiv:2410.10989).

    With p = softmax(z) the objective's gradient is p - (1 - eps) * onehot(y) - eps / V.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor, smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nll, uniform = torch.zeros((), device=hidden.device), torch.zeros((), device=hidden.device)
        slopes = []
        for states, ids in _chunks(hidden, targets):
            log_p = torch.log_softmax(_logits(head, states), dim=-1)
            nll -= log_p.gather(-1, ids[:, None]).sum()
            if smoothing:
                uniform -= log_p.mean(-1).sum()
            slope = log_p.exp_()
            if smoothing:
                slope -= smoothing / slope.shape[-1]
            slope.scatter_add_(-1, ids[:, None], slope.new_full((len(ids), 1), smoothing - 1.0))
            slopes.append(slope.to(head.weight.dtype) @ head.weight)
        ctx.save_for_backward(torch.cat(slopes).to(hidden.dtype))
        ctx.mark_non_differentiable(nll)
        objective = (1.0 - smoothing) * nll + smoothing * uniform
        return objective, nll

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradients[0].to(slope.dtype), None, None, None


def token_losses(head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each target in nats: float32 [N], for `hidden` [N, hidden] and int64 `targets` [N]."""
    return torch.cat([_token_nll(logits, t) for logits, t in _chunks_of_logits(head, hidden, targets)])


def token_replay(
    head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `token_losses`, and the most likely token at each position: float32 [N] and int64 [N]."""
    found = [(_token_nll(logits, t), logits.argmax(-1)) for logits, t in _chunks_of_logits(head, hidden, targets)]
    losses, greedy = zip(*found, strict=True)
    return torch.cat(losses), torch.cat(greedy)


def host_logits(head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """The logits themselves, float32 [N, vocabulary] on the host; on the device a chunk at a time."""
    found = [logits.cpu().numpy() for logits, _ in _chunks_of_logits(head, hidden, targets)]
    return np.concatenate(found)


def _chunks_of_logits(
    head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for states, ids in _chunks(hidden, targets):
        yield _logits(head, states), ids


def _chunks(hidden: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)


def _logits(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden, head.weight, head.bias).float()


def _token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    picked = logits.gather(-1, targets[:, None]).squeeze(-1)
    return logits.logsumexp(-1) - picked
