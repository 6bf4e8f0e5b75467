"""The boundary between the core, which owns the run, and a backend, which owns the step.

Everything that crosses is NumPy, a plain number, or a device scalar that `float()` reads. The core never imports a
tensor library; a backend never writes a file, chooses a row, a learning rate or a moment to stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, SupportsFloat

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from core.adapter import Adapter
    from core.config import RunConfig
    from core.models import ResolvedModel

IGNORE = -100
"""Target id of a position without a loss (torch's `ignore_index`)."""

FILLER_ROW = -1
"""Row id of a row that only fills up a batch; it has no targets."""

IntArray = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Tensors = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Prefix:
    """What the frozen layers below the first adapter make of a row: a function of its tokens and the base alone."""

    states: npt.NDArray[np.generic]
    """[T, hidden]: input of the first layer with an adapter, in the compute type; bfloat16 as its bits, uint16."""
    routed: npt.NDArray[np.float32] | None = None
    """float32 [2, layers, experts], of a mixture's frozen layers: tokens that each expert got, and router
    probabilities summed over the tokens."""

    @property
    def nbytes(self) -> int:
        return self.states.nbytes + (0 if self.routed is None else self.routed.nbytes)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of similar length, right-padded to one width, ready for a causal language model.

    `targets[b, t]` is the token that follows `inputs[b, t]`, or `IGNORE`.
    """

    row_ids: IntArray
    """int64 [B]: index of the row in its split; `FILLER_ROW` for a filler."""
    inputs: TokenArray
    """int32 [B, T]"""
    targets: TokenArray
    """int32 [B, T]: already shifted; `IGNORE` where there is no loss."""
    prefix: Prefix | None = None
    """When it is known: states [B, T, hidden], 0 in the padding, and routed [2, layers, experts] summed over the rows.
    A learner then begins at its first adapter."""

    @property
    def num_targets(self) -> int:
        return int(np.count_nonzero(self.targets != IGNORE))

    @property
    def num_tokens(self) -> int:
        """Positions that are computed, padding included: B x T."""
        return int(self.inputs.size)

    @property
    def is_token(self) -> BoolArray:
        """bool [B, T]: the positions up to each row's last target, which ends every row; the others are padding."""
        has_target = self.targets != IGNORE
        return np.ascontiguousarray(np.logical_or.accumulate(has_target[:, ::-1], axis=1)[:, ::-1])

    @property
    def num_real_tokens(self) -> int:
        """Positions without the padding."""
        return int(np.count_nonzero(self.is_token))

    @property
    def num_shared(self) -> int:
        """Positions before the first target that hold the same tokens in all rows but fillers; 0 for a single row.

        Attention is causal: every layer makes the same of them in all these rows (with dropout, if they share masks).
        """
        real = self.is_token.any(axis=1)
        if np.count_nonzero(real) < 2:
            return 0
        inputs, targets = self.inputs[real], self.targets[real]
        stops = (inputs != inputs[0]).any(axis=0) | (targets != IGNORE).any(axis=0)
        return int(stops.argmax())


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What an optimiser step reports. The scalars live on the device: `float()` synchronises."""

    loss: SupportsFloat
    """Pure cross-entropy in nats (no label smoothing, no auxiliary loss), summed and divided by `num_targets`."""
    grad_norm: SupportsFloat
    """Global L2 norm before clipping."""
    num_targets: int
    aux_loss: SupportsFloat | None = None
    """Load-balancing loss of the step, without its weight; None unless the adapter is on a router.

    Of a micro-batch with N tokens (padding left out) and L layers with E experts each, k of them for a token:
    E * sum over experts of f * P, with f the times that an expert was chosen over L * N and P the mean of its
    router probability over layers and tokens (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6, as transformers has it
    for Mixtral); k when all experts are used alike, E when a token's first expert is always the same and sure. Of a
    step: the mean over its tokens, so the sum over micro-batches of N / (tokens of the step) times their own.
    """


@dataclass(frozen=True, slots=True)
class RowLosses:
    """An evaluation, row by row: the mean, the interval and the worst rows all come from it."""

    row_ids: IntArray
    """int64 [N]"""
    nll: FloatArray
    """float64 [N]: negative log-likelihood in nats, summed over the row's target tokens."""
    num_targets: IntArray
    """int64 [N]"""
    expert_tokens: IntArray | None = None
    """int64 [layers, experts]: tokens that each expert got, padding left out; a token with k experts counts k times.
    None for a dense model."""

    @property
    def mean(self) -> float:
        """Sum of losses over sum of target tokens, in nats per token."""
        return float(self.nll.sum() / self.num_targets.sum())


@dataclass(frozen=True, slots=True)
class Replay:
    """An evaluation target by target: what one end of a hand-off says of the same rows."""

    row_ids: IntArray
    """int64 [N]"""
    num_targets: IntArray
    """int64 [N]"""
    nll: FloatArray
    """float64 [M]: negative log-likelihood of each target in nats, row after row; M is the sum of `num_targets`."""
    greedy: IntArray
    """int64 [M]: the most likely token at each target's position, given the right tokens before it."""

    @classmethod
    def gather(
        cls,
        batches: Sequence[Batch],
        nll: Sequence[npt.NDArray[np.floating]],
        greedy: Sequence[npt.NDArray[np.integer]],
    ) -> Replay:
        """Puts together what was found batch by batch: [targets] arrays in the order of the flattened batch."""
        ids, counts = [], []
        for batch in batches:
            per_row = np.count_nonzero(batch.targets != IGNORE, axis=1)
            ids.append(batch.row_ids[per_row > 0])
            counts.append(per_row[per_row > 0])
        return cls(
            row_ids=np.concatenate(ids).astype(np.int64),
            num_targets=np.concatenate(counts).astype(np.int64),
            nll=np.concatenate(nll).astype(np.float64),
            greedy=np.concatenate(greedy).astype(np.int64),
        )

    @property
    def row_means(self) -> FloatArray:
        """float64 [N]: mean loss of each row, in nats per token."""
        starts = np.concatenate([[0], np.cumsum(self.num_targets)[:-1]]).astype(np.int64)
        means: FloatArray = np.add.reduceat(self.nll, starts) / self.num_targets
        return means


@dataclass(frozen=True, slots=True)
class TrainState:
    """Everything a backend needs to continue: under neutral names, in NumPy.

    `adapter` has the names and shapes of `core.adapter.Adapter.tensors`. `optimizer` has `<slot>/<tensor name>`, with
    torch's slot names: `exp_avg` and `exp_avg_sq` (AdamW), `exp_avg` (Lion), `momentum` (SGD), `row_var`,
    `col_var` or `exp_avg_sq` (Adafactor). 8-bit AdamW keeps its quantised form: `state1`, `absmax1`, `qmap1` and so on.
    """

    adapter: Tensors
    optimizer: Tensors
    optimizer_steps: int = 0
    """Updates the optimiser has applied: what Adam's bias correction counts."""


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Bytes on the device (on a CPU: of this process)."""

    current_bytes: int
    peak_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What a backend finds on this machine. Made by `Backend.probe`, which never raises."""

    backend: str
    available: bool
    """Whether this backend can train here."""
    device: str
    """For people: `Apple M3 Max`, `NVIDIA H200`, `CPU (2 cores)`."""
    accelerator: bool
    """False on a CPU."""
    memory_bytes: int
    """Total memory of the device; 0 when unknown."""
    problem: str = ""
    """Why it is not available, and what to do, in a line."""
    notes: tuple[str, ...] = ()
    packages: Mapping[str, str] = field(default_factory=dict)
    """Installed versions of the packages that this backend imports; missing ones are left out."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a loaded model, with what belongs to it (scales)."""

    name: str
    dtype: str
    """As the device holds it: `float32`, `bfloat16`, `nf4`, `affine 4-bit` …"""
    parameters: int
    bytes: int


class Learner(Protocol):
    """A model with an adapter and an optimiser, on a device."""

    @property
    def num_parameters(self) -> int: ...

    @property
    def num_trainable(self) -> int: ...

    @property
    def description(self) -> str:
        """What was loaded, for a person: `16-bit, float32 compute, CPU (2 cores)`."""
        ...

    @property
    def num_prefix_layers(self) -> int:
        """Layers below the lowest adapter: what they make of a row never changes."""
        ...

    def prefixes(self, rows: Sequence[TokenArray]) -> Iterator[Prefix]:
        """What these layers make of each row, in order.

        Every row is computed by itself and without padding, so that its prefix is the same to the bit whatever rows
        are asked for with it.

        Args:
            rows: int32 [T] each: a row's inputs without padding.

        Raises:
            OutOfMemoryError: a row did not fit.
        """
        ...

    @property
    def state_bits(self) -> Literal[8, 32]:
        """Precision in which the optimiser here keeps its state, whatever `optim.state_bits` asks for."""
        ...

    def train_step(self, microbatches: Sequence[Batch], *, step: int, lr: float) -> StepOutput:
        """One optimiser step over all `microbatches`; `step` counts from 1. Raises `OutOfMemoryError`."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> RowLosses:
        """Loss of every row, without dropout, at the present weights; rows in the batches' order."""
        ...

    def replay(self, batches: Iterable[Batch]) -> Replay:
        """As `evaluate`, but target by target, with the token that the model would have chosen."""
        ...

    def target_logits(self, batch: Batch) -> npt.NDArray[np.float32]:
        """The next-token logits at every target, without dropout: float32 [targets, vocabulary], in the order of the
        flattened batch, on the host. A target takes 4 bytes for each token of the vocabulary: ask for few at a time.

        Raises:
            OutOfMemoryError: the batch did not fit.
        """
        ...

    def export_state(self) -> TrainState: ...

    def import_state(self, state: TrainState) -> None:
        """Continues from `state`. AdamW's moments may come in 8 bits or in 32, whichever are kept here."""
        ...

    def weights(self) -> Sequence[Weight]:
        """Every tensor of base and adapter, once."""
        ...

    def memory(self) -> MemoryStats: ...

    def close(self) -> None: ...


class Backend(Protocol):
    """A way to compute. `backends.get(name)` returns one; importing it must not import its tensor library."""

    name: str

    def probe(self, device: str = "auto") -> DeviceReport: ...

    def check(self, config: RunConfig) -> Sequence[str]:
        """Warnings for settings that have no effect here. Raises `UserError` for those that can't work."""
        ...

    def open(self, config: RunConfig, model: ResolvedModel, initial: Adapter) -> Learner:
        """Loads the frozen base and puts `initial` on it. Raises `UserError`."""
        ...
