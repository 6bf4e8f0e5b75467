"""Cross-entropy at target positions, without ever holding a whole batch's logits in float32.

For logits z and target y: CE = logsumexp(z) - z[y]. Label smoothing (Szegedy et al. 2016, arXiv:1512.00567)
optimises (1 - eps) * CE + eps * mean over v of -log p(v), and the mean is logsumexp(z) - mean(z).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
"""Target positions whose float32 logits exist at one time."""


def summed_losses(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, *, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Objective and cross-entropy, each summed over the targets.

    Args:
        head: output projection, hidden size to vocabulary.
        hidden: [N, hidden] final hidden states at the target positions.
        targets: int64 [N] token ids.
        smoothing: eps above.

    Returns:
        float32 scalars: what is differentiated, and the pure cross-entropy in nats (no gradient).
    """
    if len(targets) <= CHUNK:
        objective, nll = _chunk_losses(head, hidden, targets, smoothing)
        return objective, nll.detach()
    objectives, nlls = [], []
    for states, ids in _chunks(hidden, targets):
        # Recomputed in the backward pass, so that one chunk's logits exist at a time.
        objective, nll = checkpoint(
            _chunk_losses,
            head,
            states,
            ids,
            smoothing,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        objectives.append(objective)
        nlls.append(nll.detach())
    return torch.stack(objectives).sum(), torch.stack(nlls).sum()


def token_losses(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each target in nats: float32 [N], for `hidden` [N, hidden] and int64 `targets` [N]."""
    return torch.cat([_token_nll(logits, t) for logits, t in _chunks_of_logits(head, hidden, targets)])


def token_replay(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `token_losses`, and the most likely token at each position: float32 [N] and int64 [N]."""
    found = [(_token_nll(logits, t), logits.argmax(-1)) for logits, t in _chunks_of_logits(head, hidden, targets)]
    losses, greedy = zip(*found, strict=True)
    return torch.cat(losses), torch.cat(greedy)


def _chunks_of_logits(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for states, ids in _chunks(hidden, targets):
        yield _logits(head, states), ids


def _chunks(hidden: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)


def _logits(head: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = head(hidden)
    return logits.float()


def _token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    picked = logits.gather(-1, targets[:, None]).squeeze(-1)
    return logits.logsumexp(-1) - picked


def _chunk_losses(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = _logits(head, hidden)
    normaliser = logits.logsumexp(-1)
    nll = (normaliser - logits.gather(-1, targets[:, None]).squeeze(-1)).sum()
    if smoothing == 0.0:
        return nll, nll
    uniform = (normaliser - logits.mean(-1)).sum()
    return (1.0 - smoothing) * nll + smoothing * uniform, nll
