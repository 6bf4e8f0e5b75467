"""Cross-entropy at target positions, without ever holding a whole batch's logits in float32.

For logits z and target y: CE = logsumexp(z) - z[y]. Label smoothing (Szegedy et al. 2016, arXiv:1512.00567)
optimises (1 - eps) * CE + eps * mean over v of -log p(v), and the mean is logsumexp(z) - mean(z).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

CHUNK = 1024
"""Target positions whose float32 logits exist at one time."""
COLUMNS = 2048
"""On a CPU, of so many of the vocabulary's tokens: they stay in the processor's cache."""


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
    On a CPU a chunk is of positions and of tokens (`_Columns`), so that it stays in the cache.

    With p = softmax(z) the objective's gradient is p - (1 - eps) * onehot(y) - eps / V.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor, smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if _by_columns(hidden):
            mean = head.weight.mean(0, dtype=torch.float32) if smoothing else None
            parts = [_columns_pass(head, states, ids, smoothing, mean) for states, ids in _chunks(hidden, targets)]
        else:
            parts = [_rows_pass(head, states, ids, smoothing) for states, ids in _chunks(hidden, targets)]
        losses, means, slopes = zip(*parts, strict=True)
        zero = torch.zeros((), device=hidden.device)
        nll, uniform = sum(losses, zero), sum(means, zero)
        ctx.save_for_backward(torch.cat(slopes).to(hidden.dtype))
        ctx.mark_non_differentiable(nll)
        objective = (1.0 - smoothing) * nll + smoothing * uniform
        return objective, nll

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradients[0].to(slope.dtype), None, None, None


_Pass = tuple[torch.Tensor, torch.Tensor | float, torch.Tensor]
"""Summed cross-entropy, summed -mean of log p (0 without smoothing), and the objective's gradient [N, hidden]."""


def _rows_pass(head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, smoothing: float) -> _Pass:
    log_p = torch.log_softmax(_logits(head, hidden), dim=-1)
    nll = -log_p.gather(-1, targets[:, None]).sum()
    uniform = -log_p.mean(-1).sum() if smoothing else 0.0
    slope = log_p.exp_()
    if smoothing:
        slope -= smoothing / slope.shape[-1]
    slope.scatter_add_(-1, targets[:, None], slope.new_full((len(targets), 1), smoothing - 1.0))
    return nll, uniform, slope.to(head.weight.dtype) @ head.weight


def _columns_pass(
    head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, smoothing: float, mean: torch.Tensor | None
) -> _Pass:
    """As `_rows_pass`, without ever having a whole row of logits. `mean`: of the head's rows, for smoothing."""
    sums = _Columns.over(head, hidden, targets, with_slope=True)
    slope = sums.softmax_slope().sub_(head.weight[targets], alpha=1.0 - smoothing)
    if mean is None:
        return sums.nll().sum(), 0.0, slope
    mean_bias = 0.0 if head.bias is None else head.bias.float().mean()
    mean_logit = (hidden.float() * mean).sum(-1) + mean_bias
    return sums.nll().sum(), (sums.log_total() - mean_logit).sum(), slope.sub_(mean, alpha=smoothing)


def _by_columns(hidden: torch.Tensor) -> bool:
    """Whether a part of the vocabulary at a time; a GPU has no cache for which that would pay."""
    return hidden.device.type == "cpu"


@dataclass(slots=True)
class _Columns:
    """Of N positions, what a softmax over the tokens so far needs (Milakov and Gimelshein 2018, arXiv:1805.02867).

    All float32: `largest` logit, sum of exp(logit - largest), and the target's logit, each [N]; and the sum over the
    tokens of exp(logit - largest) times the head's row, as in FlashAttention (arXiv:2205.14135), [N, hidden].
    """

    largest: torch.Tensor
    exponentials: torch.Tensor
    at_target: torch.Tensor
    weighted: torch.Tensor | None

    @classmethod
    def over(
        cls, head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, *, with_slope: bool = False
    ) -> _Columns:
        """The whole vocabulary. `hidden` [N, hidden], `targets` int64 [N]; without `with_slope` nothing `weighted`."""
        zeros = torch.zeros(len(hidden), dtype=torch.float32)
        sums = cls(
            torch.full_like(zeros, -torch.inf),
            zeros.clone(),
            zeros.clone(),
            torch.zeros(hidden.shape, dtype=torch.float32) if with_slope else None,
        )
        for start, logits in _columns_of_logits(head, hidden):
            sums._add(logits, targets - start, head.weight[start : start + logits.shape[1]])
        return sums

    def _add(self, logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> None:
        """`logits` [N, tokens] of the next tokens, which are overwritten; `targets` counted from the first of them."""
        is_here = (targets >= 0) & (targets < len(weight))
        at_target = logits.gather(-1, targets.clamp(0, len(weight) - 1)[:, None])[:, 0]
        self.at_target = torch.where(is_here, at_target, self.at_target)
        largest = torch.maximum(self.largest, logits.amax(-1))
        # tokens that can't be, all at -inf, are nothing to subtract; a NaN is unequal and stays
        finite = torch.where(largest == -torch.inf, 0.0, largest)
        shrink = (self.largest - finite).exp_()
        powers = logits.sub_(finite[:, None]).exp_()
        self.largest, self.exponentials = largest, self.exponentials.mul_(shrink).add_(powers.sum(-1))
        if self.weighted is None:
            return
        self.weighted.mul_(shrink[:, None])
        if weight.dtype == torch.float32:
            self.weighted.addmm_(powers, weight)
        else:
            self.weighted += powers.to(weight.dtype) @ weight

    def log_total(self) -> torch.Tensor:
        """logsumexp of the logits, [N]"""
        return self.largest + self.exponentials.log()

    def nll(self) -> torch.Tensor:
        """Cross-entropy, [N]"""
        return self.log_total() - self.at_target

    def softmax_slope(self) -> torch.Tensor:
        """The gradient of `log_total` with respect to the hidden states, float32 [N, hidden]; only once."""
        assert self.weighted is not None, "made without a slope"
        return self.weighted.div_(self.exponentials[:, None])


def _columns_of_logits(head: torch.nn.Linear, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The first token's id and the float32 logits [N, tokens], each until the next ones come."""
    is_wide = hidden.dtype == head.weight.dtype == torch.float32 and head.bias is None
    # memory that is asked for and given back each time is cleared by the system each time
    kept = hidden.new_empty(len(hidden) * min(COLUMNS, head.out_features)) if is_wide else None
    for start in range(0, head.out_features, COLUMNS):
        weight = head.weight[start : start + COLUMNS]
        if kept is None:
            bias = None if head.bias is None else head.bias[start : start + COLUMNS]
            yield start, F.linear(hidden, weight, bias).float()
        else:
            place = kept[: len(hidden) * len(weight)].view(len(hidden), -1)
            yield start, torch.mm(hidden, weight.t(), out=place)


def token_losses(head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each target in nats: float32 [N], for `hidden` [N, hidden] and int64 `targets` [N]."""
    if _by_columns(hidden):
        return torch.cat([_Columns.over(head, states, ids).nll() for states, ids in _chunks(hidden, targets)])
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
