"""A learner without a tensor library: a unigram model in NumPy, trained by SGD with momentum.

Its logits are the column sums of the adapter's tensors, its loss the exact cross-entropy, its dropout a mask from
`step_seed`. So the loop, checkpoints and resume can be tested in milliseconds, bit for bit, on a model that
really learns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from core.protocols import IGNORE, Batch, MemoryStats, Replay, RowLosses, StepOutput, TrainState, Weight
from core.seeding import generator, step_seed

VOCAB = 16
NAME = "model.layers.0.self_attn.q_proj.lora_A"


class FakeLearner:
    """See the module's docstring. `fail_at` makes the loss of that step NaN.

    `routes` makes it a mixture: it sends a token to two of four experts in each of two layers, and reports a
    load-balancing loss of its step number plus its tokens.
    """

    num_parameters = VOCAB
    num_trainable = VOCAB
    description = "fake"
    state_bits: Literal[8, 32] = 32

    def __init__(
        self, *, seed: int = 0, dropout: float = 0.1, fail_at: int | None = None, routes: bool = False
    ) -> None:
        self.routes = routes
        self.logits = np.zeros((1, VOCAB), np.float32)
        self.momentum = np.zeros_like(self.logits)
        self.steps = 0
        self.seed, self.dropout, self.fail_at = seed, dropout, fail_at
        self.calls: list[str] = []
        self.seen: list[int] = []

    def train_step(self, microbatches: Sequence[Batch], *, step: int, lr: float) -> StepOutput:
        self.calls.append(f"step {step}")
        total = sum(batch.num_targets for batch in microbatches)
        loss, grad = 0.0, np.zeros(VOCAB)
        for index, batch in enumerate(microbatches):
            self.seen += batch.row_ids.tolist()
            rng = np.random.default_rng(step_seed(self.seed, step, index))
            kept = (rng.random(VOCAB) >= self.dropout) / (1 - self.dropout)
            targets = batch.targets[batch.targets != IGNORE]
            logp = _log_softmax(self.logits[0].astype(np.float64) * kept)
            loss -= logp[targets].sum()
            grad += (np.exp(logp) * len(targets) - np.bincount(targets, minlength=VOCAB)) * kept
        grad = (grad / total).astype(np.float32)
        self.momentum = 0.9 * self.momentum + grad[None]
        self.logits = self.logits - np.float32(lr) * self.momentum
        self.steps += 1
        value = float("nan") if step == self.fail_at else loss / total
        tokens = sum(batch.num_real_tokens for batch in microbatches)
        aux_loss = float(step + tokens) if self.routes else None
        return StepOutput(loss=value, grad_norm=float(np.linalg.norm(grad)), num_targets=total, aux_loss=aux_loss)

    def evaluate(self, batches: Iterable[Batch]) -> RowLosses:
        self.calls.append("evaluate")
        logp = _log_softmax(self.logits[0].astype(np.float64))
        ids, nll, counts = [], [], []
        for batch in batches:
            for row, targets in zip(batch.row_ids, batch.targets, strict=True):
                chosen = targets[targets != IGNORE]
                ids.append(int(row))
                nll.append(-float(logp[chosen].sum()))
                counts.append(len(chosen))
        return RowLosses(np.array(ids), np.array(nll), np.array(counts), self._expert_tokens(sum(counts)))

    def _expert_tokens(self, num_tokens: int) -> np.ndarray[Any, Any] | None:
        """The first layer uses its experts alike before the first step, and each step sends a token elsewhere."""
        if not self.routes:
            return None
        even, rest, moved = *divmod(num_tokens, 2), self.steps
        first = [even + rest + moved, even + rest + moved, even - moved, even - moved]
        return np.array([first, [num_tokens, num_tokens, 0, 0]], np.int64)

    def replay(self, batches: Iterable[Batch]) -> Replay:
        logp = _log_softmax(self.logits[0].astype(np.float64))
        some = list(batches)
        targets = [batch.targets[batch.targets != IGNORE] for batch in some]
        greedy = [np.full(len(chosen), logp.argmax()) for chosen in targets]
        return Replay.gather(some, [-logp[chosen] for chosen in targets], greedy)

    def target_logits(self, batch: Batch) -> npt.NDArray[np.float32]:
        return np.repeat(self.logits, batch.num_targets, axis=0)

    def export_state(self) -> TrainState:
        self.calls.append("export")
        return TrainState({NAME: self.logits.copy()}, {f"momentum/{NAME}": self.momentum.copy()}, self.steps)

    def import_state(self, state: TrainState) -> None:
        self.logits = np.array(state.adapter[NAME], np.float32)
        self.momentum = np.array(state.optimizer.get(f"momentum/{NAME}", np.zeros_like(self.logits)), np.float32)
        self.steps = state.optimizer_steps

    def weights(self) -> list[Weight]:
        return [Weight(NAME, "float32", VOCAB, 4 * VOCAB)]

    def memory(self) -> MemoryStats:
        return MemoryStats(10**9, 2 * 10**9, 4 * 10**9)

    def close(self) -> None:
        self.calls.append("close")


def _log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


class FakeData:
    """Rows of random tokens, a fixed number of them a batch; implements `core.trainer.TrainingData`."""

    def __init__(self, *, num_rows: int = 20, num_val: int = 6, batch_size: int = 3, seed: int = 0) -> None:
        rng = generator(seed, "fake data")
        weights = np.arange(1, VOCAB + 1) ** 2.0
        draw = lambda: rng.choice(VOCAB, size=rng.integers(3, 9), p=weights / weights.sum())  # noqa: E731
        self.rows = [draw() for _ in range(num_rows)]
        self.val_rows = [draw() for _ in range(num_val)]
        self.num_train_rows, self.num_val_rows, self.seed = num_rows, num_val, seed
        self.batch_size = batch_size
        self.general_rows: list[np.ndarray[Any, Any]] = []
        self.batches_per_epoch = -(-num_rows // batch_size)

    def epoch(self, epoch: int) -> Sequence[Batch]:
        order = generator(self.seed, "order", epoch).permutation(self.num_train_rows)
        return [self._batch(self.rows, order[i : i + self.batch_size]) for i in range(0, len(order), self.batch_size)]

    @property
    def validation(self) -> Sequence[Batch]:
        return [self._batch(self.val_rows, np.arange(self.num_val_rows))]

    @property
    def probe(self) -> Sequence[Batch]:
        return [self._batch(self.rows, np.arange(5))]

    @property
    def general(self) -> Sequence[Batch]:
        return [self._batch(self.general_rows, np.arange(len(self.general_rows)))] if self.general_rows else []

    def name_rows(self, row_ids: np.ndarray[Any, Any]) -> str:
        return ", ".join(f"fake:{row}" for row in row_ids)

    def _batch(self, rows: list[np.ndarray[Any, Any]], chosen: np.ndarray[Any, Any]) -> Batch:
        width = max(len(rows[i]) for i in chosen)
        targets = np.full((len(chosen), width), IGNORE, np.int32)
        for place, row in enumerate(chosen):
            targets[place, : len(rows[row])] = rows[row]
        return Batch(chosen.astype(np.int64), np.zeros_like(targets), targets)


class SilentScreen:
    """Shows nothing, remembers the evaluations."""

    def __init__(self) -> None:
        self.evaluations: list[int] = []
        self.routings: list[int] = []

    def show_step(self, *, step: int, epoch: float) -> None: ...

    def show_record(self, record: object) -> None: ...

    def show_evaluation(self, gap: object, *, step: int, is_best: bool, patience_left: int | None) -> None:
        self.evaluations.append(step)

    def show_unjudged(self, loss: float, *, step: int) -> None:
        self.evaluations.append(step)

    def show_routing(self, report: object, *, step: int) -> None:
        self.routings.append(step)

    def show_phase(self, phase: str) -> None: ...
