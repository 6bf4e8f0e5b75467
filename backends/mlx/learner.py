"""Training and evaluating an adapter with MLX.

The step is functional: adapter and optimiser state go into compiled functions and come back. No module state is
captured, so a restored state is simply used by the next call, and a trace leaves nothing behind.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from backends.mlx.absent_layers import StreamedPart, prefixes, streamed_gradients
from backends.mlx.cores import num_streams, on_streams
from backends.mlx.loss import Selection, host_logits, summed_loss, token_losses, token_replay
from backends.mlx.memory import MemoryMeter, translate_out_of_memory, trim_memory
from backends.mlx.model import Network
from backends.mlx.optim import Slots, clip_factor, global_norm, initial_slots, make_optimizer
from backends.mlx.packing import Layout
from backends.mlx.parts import Cutter, Part, to_prefix
from backends.mlx.routers import balancing_loss
from backends.mlx.rows import joined, per_row, real, summed_by_row
from core.adapter import trains_router
from core.config import RunConfig
from core.errors import UserError
from core.optimizer_state import dequantised
from core.protocols import (
    Batch,
    FloatArray,
    IntArray,
    MemoryStats,
    Prefix,
    Replay,
    RowLosses,
    StepOutput,
    Tensors,
    TokenArray,
    TrainState,
    Weight,
)
from core.seeding import step_seed

Parameters = dict[str, mx.array]
Sums = tuple[mx.array, ...]
"""Scalars of a step, summed over its micro-batches: the cross-entropy and, with an adapter on a router, the
load-balancing loss times the share of the step's tokens."""
AuxArrays = tuple[mx.array, mx.array | None, mx.array, mx.array]
"""What the load-balancing loss needs of a micro-batch: tokens float32 [B, T], 0 for padding; `Prefix.routed`, if the
batch has one; the share of the step's tokens that are in it; and the factor in the objective, which is summed over the
step's targets."""


@dataclass(frozen=True, slots=True)
class _Work:
    """A part of a training step."""

    part: Part
    key: mx.array
    """Of its dropout masks."""
    aux: AuxArrays | None


class MlxLearner:
    """A `core.protocols.Learner`. Made by `MlxBackend.open`."""

    state_bits: Literal[8, 32] = 32

    def __init__(
        self,
        network: Network,
        parameters: Parameters,
        config: RunConfig,
        *,
        description: str,
        num_base_parameters: int,
        accelerator: bool,
        compiled: bool,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.network = network
        self.description = description
        self.num_trainable = sum(array.size for array in parameters.values())
        self.num_parameters = num_base_parameters + self.num_trainable
        self.num_prefix_layers = network.num_prefix_layers
        self.parameters = parameters
        self._seed = config.train.seed
        self._max_grad_norm = config.optim.max_grad_norm
        self._label_smoothing = config.optim.label_smoothing
        self._has_aux_loss = trains_router(name.rpartition(".")[0] for name in parameters)
        self._aux_weight = config.moe.aux_loss_weight
        self._optimizer = make_optimizer(config.optim)
        self._slots = initial_slots(self._optimizer, parameters)
        self._optimizer_steps = 0
        self._meter = MemoryMeter(accelerator=accelerator)
        self._on_close = on_close
        self._closed = False
        self._cutter = Cutter(network, compiled=compiled, num_streams=num_streams())
        compile_ = mx.compile if compiled else _as_it_is
        self._gradients = compile_(self._gradients_of_microbatch)
        self._update = compile_(self._updated)
        self._losses = compile_(self._losses_of_batch)
        mx.eval(self.parameters, self._slots)  # waits: a lack of memory shows here, not in the first step

    # -- the step

    def train_step(self, microbatches: Sequence[Batch], *, step: int, lr: float) -> StepOutput:
        """Submits one optimiser step; returns before the update, and on a GPU anything, is computed."""
        num_targets = sum(batch.num_targets for batch in microbatches)
        assert num_targets > 0, "a step without a target token"
        with translate_out_of_memory(f"a training step of {_shapes(microbatches)}"):
            work = self._work(microbatches, step=step, num_targets=num_targets)
            if self._cutter.by_row:
                # At most as many rows at once as the largest micro-batch has: memory does not grow with the cores.
                most = max(2, *(len(batch.row_ids) for batch in microbatches))
                sums, total = self._summed(work, count=min(self._cutter.num_streams, most))
            else:
                sums, total = self._summed_on_device(work)
            return self._apply(sums, total, num_targets=num_targets, lr=lr)

    def _work(self, microbatches: Sequence[Batch], *, step: int, num_targets: int) -> Iterator[_Work]:
        num_tokens = sum(batch.num_real_tokens for batch in microbatches)
        for index, batch in enumerate(microbatches):
            parts = self._cutter.parts(batch)
            if not parts:
                continue
            key = mx.random.key(step_seed(self._seed, step, index))
            # A key for each part: on another number of cores, which makes other parts, the masks are others.
            keys = [key] if len(parts) == 1 else list(mx.random.split(key, len(parts)))
            aux = self._aux_arrays(batch, batch.num_real_tokens / num_tokens, num_targets)
            yield from (_Work(part, own, aux) for part, own in zip(parts, keys, strict=True))

    def _summed_on_device(self, work: Iterable[_Work]) -> tuple[Sums, Parameters]:
        sums: Sums | None = None
        total: Parameters | None = None
        for one in work:
            sums, total = self._gradients(self.parameters, sums, total, one.key, one.aux, *one.part.arrays)
            mx.async_eval(sums, total)
        assert sums is not None and total is not None
        return sums, total

    def _summed(self, work: Iterable[_Work], *, count: int) -> tuple[Sums, Parameters]:
        """As `_summed_on_device`, `count` at a time; added up in the order of the work."""
        if self.network.streams:
            found = self._streamed(list(work))
        else:
            found = on_streams(self._gradients_of, work, count=count)
        sums: Sums | None = None
        total: Parameters | None = None
        with closing(found):
            for own_sums, own in found:
                sums, total = _added(sums, total, own_sums, own)
                mx.async_eval(sums, total)
        assert sums is not None and total is not None
        return sums, total

    def _gradients_of(self, one: _Work) -> tuple[Sums, Parameters]:
        found: tuple[Sums, Parameters]
        found = self._gradients(self.parameters, None, None, one.key, one.aux, *one.part.arrays)
        return found

    def _streamed(self, work: Sequence[_Work]) -> Generator[tuple[Sums, Parameters], None, None]:
        parts = [
            StreamedPart(
                tokens=one.part.tokens,
                layout=one.part.layout,
                keys=self.network.dropout_keys(one.key),
                loss=self._loss(one.part.position, one.part.target, one.part.weight),
            )
            for one in work
        ]
        yield from (((nll,), own) for nll, own in streamed_gradients(self.network, self.parameters, parts))

    def _aux_arrays(self, batch: Batch, share: float, num_targets: int) -> AuxArrays | None:
        if not self._has_aux_loss:
            return None
        factor = self._aux_weight * share * num_targets
        return mx.array(batch.is_token.astype(np.float32)), _routed_below(batch), mx.array(share), mx.array(factor)

    def _apply(self, sums: Sums, total: Parameters, *, num_targets: int, lr: float) -> StepOutput:
        steps = self._optimizer_steps + 1
        coefficients = mx.array(self._optimizer.coefficients(lr, steps), mx.float32)
        mean, norm, parameters, slots = self._update(
            self.parameters, self._slots, total, sums[0], mx.array(1.0 / num_targets), coefficients
        )
        mx.async_eval(mean, norm, parameters, slots)
        self.parameters, self._slots, self._optimizer_steps = parameters, slots, steps
        aux_loss = _Scalar(sums[1]) if len(sums) > 1 else None
        return StepOutput(loss=_Scalar(mean), grad_norm=_Scalar(norm), num_targets=num_targets, aux_loss=aux_loss)

    def _gradients_of_microbatch(
        self,
        parameters: Parameters,
        sums_so_far: Sums | None,
        total_so_far: Parameters | None,
        key: mx.array,
        aux: AuxArrays | None,
        layout: Layout | None,
        tokens: mx.array,
        position: mx.array,
        target: mx.array,
        weight: mx.array,
    ) -> tuple[Sums, Parameters]:
        """Adds a micro-batch's losses and the gradient of its summed objective to those so far."""
        network, keys = self.network, self.network.dropout_keys(key)
        loss = self._loss(position, target, weight)

        def objective(parameters: Parameters) -> tuple[mx.array, Sums]:
            is_token = None if aux is None else aux[0]
            hidden, routed = network.routed_states(
                parameters, tokens, layout=layout, is_token=is_token, keys=keys, training=True
            )
            carrier, nll = loss(hidden)
            if aux is None:
                return carrier, (nll,)
            real, below, share, factor = aux
            aux_loss = balancing_loss(routed, real.sum(), below=below)
            if self._aux_weight:
                carrier = carrier + factor * aux_loss
            return carrier, (nll, share * mx.stop_gradient(aux_loss))

        if network.streams:
            assert aux is None, "streamed layers have no load-balancing loss"
            part = StreamedPart(tokens, layout, keys, loss)
            ((nll, gradients),) = streamed_gradients(network, parameters, [part])
            sums: Sums = (nll,)
        else:
            (_, sums), gradients = mx.value_and_grad(objective)(parameters)
        return _added(sums_so_far, total_so_far, sums, gradients)

    def _loss(self, position: mx.array, target: mx.array, weight: mx.array) -> Callable[..., tuple[mx.array, mx.array]]:
        return functools.partial(
            summed_loss,
            self.network.project,
            position=position,
            target=target,
            weight=weight,
            vocabulary=self.network.vocabulary,
            label_smoothing=self._label_smoothing,
        )

    def _updated(
        self,
        parameters: Parameters,
        slots: dict[str, Slots],
        total: Parameters,
        loss: mx.array,
        share: mx.array,
        coefficients: mx.array,
    ) -> tuple[mx.array, mx.array, Parameters, dict[str, Slots]]:
        # In one layout, so that sums run in the same order whether the step before was restored or computed.
        gradients = {name: mx.contiguous(array) * share for name, array in total.items()}
        norm = global_norm(gradients)
        if self._max_grad_norm is not None:
            factor = clip_factor(norm, self._max_grad_norm)
            gradients = {name: gradient * factor for name, gradient in gradients.items()}
        updated: Parameters = {}
        new_slots: dict[str, Slots] = {}
        for name, gradient in gradients.items():
            updated[name], new_slots[name] = self._optimizer.update(
                parameters[name], gradient, slots[name], coefficients
            )
        return loss * share, norm, updated, new_slots

    # -- evaluation

    def evaluate(self, batches: Iterable[Batch]) -> RowLosses:
        return self._evaluate_on_cores(batches) if self._cutter.by_row else self._evaluate_on_device(batches)

    def _evaluate_on_device(self, batches: Iterable[Batch]) -> RowLosses:
        found: list[RowLosses] = []
        counts: mx.array | None = None
        waiting: tuple[Batch, Selection, mx.array] | None = None
        for batch in batches:
            with translate_out_of_memory(f"an evaluation of {_shapes([batch])}"):
                part = self._cutter.whole(batch)
                is_token = mx.array(batch.is_token.astype(np.int32)) if self.network.is_mixture else None
                below = _routed_below(batch) if self.network.is_mixture else None
                losses, counts = self._losses(self.parameters, counts, *part.arrays[:-1], is_token, below)
                mx.async_eval(losses, counts)
                # Read one batch behind, so that the device computes while the host sums.
                if waiting is not None:
                    found.append(per_row(*waiting))
            waiting = batch, part.selection, losses
        if waiting is not None:
            with translate_out_of_memory("an evaluation"):
                found.append(per_row(*waiting))
        return replace(joined(found), expert_tokens=None if counts is None else np.array(counts).astype(np.int64))

    def _evaluate_on_cores(self, batches: Iterable[Batch]) -> RowLosses:
        row_ids: list[IntArray] = []

        def pieces() -> Iterator[tuple[int, Part]]:
            for batch, parts in self._cutter.for_evaluation(batches):
                row_ids.append(batch.row_ids)
                yield from ((len(row_ids) - 1, part) for part in parts)

        nll: dict[int, FloatArray] = {}
        num_targets: dict[int, IntArray] = {}
        with translate_out_of_memory("an evaluation"):
            count = 1 if self.network.streams else self._cutter.num_streams
            with closing(on_streams(self._losses_of, pieces(), count=count)) as computed:
                for number, selection, losses in computed:
                    values = np.array(losses[: selection.num_targets], np.float64)
                    sums, counts = summed_by_row(values, selection.row, len(row_ids[number]))
                    nll[number] = nll.get(number, 0.0) + sums
                    num_targets[number] = num_targets.get(number, 0) + counts
        found = [
            real(ids, nll.get(number, np.zeros(len(ids))), num_targets.get(number, np.zeros(len(ids), np.int64)))
            for number, ids in enumerate(row_ids)
        ]
        return joined(found)

    def _losses_of(self, numbered: tuple[int, Part]) -> tuple[int, Selection, mx.array]:
        """The batch's number, and the loss of each of the part's targets."""
        number, part = numbered
        losses, _ = self._losses(self.parameters, None, *part.arrays[:-1], None, None)
        return number, part.selection, losses

    def replay(self, batches: Iterable[Batch]) -> Replay:
        """Waits for the device at every batch: it is for a few rows."""
        some = [batch for batch in batches if batch.num_targets]
        found = [self._replay(batch) for batch in some]
        return Replay.gather(some, [nll for nll, _ in found], [greedy for _, greedy in found])

    def _replay(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        with translate_out_of_memory(f"an evaluation of {_shapes([batch])}"):
            part = self._cutter.whole(batch)
            hidden = self.network.hidden_states(self.parameters, part.tokens, layout=part.layout)
            found = token_replay(self.network.project, hidden, part.position, part.target)
            mx.eval(found)
            nll, greedy = (np.array(array[: part.selection.num_targets]) for array in found)
        return nll, greedy

    def target_logits(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Float32 [targets, vocabulary] on the host, in the order of the flattened batch. Waits for the device."""
        with translate_out_of_memory(f"an evaluation of {_shapes([batch])}"):
            part = self._cutter.whole(batch)
            hidden = self.network.hidden_states(self.parameters, part.tokens, layout=part.layout)
            return host_logits(self.network.project, hidden, part.position)[: part.selection.num_targets]

    def _losses_of_batch(
        self,
        parameters: Parameters,
        counts_so_far: mx.array | None,
        layout: Layout | None,
        tokens: mx.array,
        position: mx.array,
        target: mx.array,
        is_token: mx.array | None,
        below: mx.array | None,
    ) -> tuple[mx.array, mx.array | None]:
        """The loss of each target, and of a mixture the tokens of each expert, int32 [layers, experts], so far."""
        hidden, routed = self.network.routed_states(parameters, tokens, layout=layout, is_token=is_token)
        losses = token_losses(self.network.project, hidden, position, target, vocabulary=self.network.vocabulary)
        if not routed:
            return losses, None
        counts = mx.stack([counts for counts, _ in routed])
        if below is not None:
            counts = mx.concatenate([below[0].astype(counts.dtype), counts])
        return losses, counts if counts_so_far is None else counts_so_far + counts

    # -- what never changes

    def prefixes(self, rows: Sequence[TokenArray]) -> Iterator[Prefix]:
        """What the layers below the first adapter make of each row, one row at a time."""
        waiting: tuple[mx.array, mx.array | None] | None = None
        with closing(prefixes(self.network, rows)) as computing:
            while True:
                with translate_out_of_memory("the frozen layers"):
                    computed = next(computing, None)
                    if computed is not None:
                        mx.async_eval(computed)
                    # Read one row behind, so that the device computes while the host copies and writes.
                    before = None if waiting is None else to_prefix(*waiting)
                if before is not None:
                    yield before
                if computed is None:
                    return
                waiting = computed

    # -- state

    def export_state(self) -> TrainState:
        """Copies to the host: a synchronisation."""
        optimizer = {
            f"{slot}/{name}": np.array(array) for name, slots in self._slots.items() for slot, array in slots.items()
        }
        adapter = {name: np.array(array) for name, array in self.parameters.items()}
        return TrainState(adapter, optimizer, self._optimizer_steps)

    def import_state(self, state: TrainState) -> None:
        """Takes up where `state` was exported. No optimiser state at all means a fresh optimiser.

        AdamW's moments in bitsandbytes' 8 bits are dequantised.

        Raises:
            UserError: other tensors or shapes than this adapter and optimiser have.
        """
        parameters = _matching(state.adapter, self.parameters, "adapter")
        fresh = initial_slots(self._optimizer, parameters)
        if state.optimizer or state.optimizer_steps:
            flat = {f"{slot}/{name}": array for name, slots in fresh.items() for slot, array in slots.items()}
            loaded = _matching(dequantised(state.optimizer), flat, "optimiser state")
            fresh = {name: {slot: loaded[f"{slot}/{name}"] for slot in slots} for name, slots in fresh.items()}
        mx.eval(parameters, fresh)
        self.parameters, self._slots = parameters, fresh
        self._optimizer_steps = state.optimizer_steps

    def weights(self) -> list[Weight]:
        """Every tensor of base and adapter, once; a packed one with its scales."""
        adapter = [
            Weight(name, str(array.dtype).removeprefix("mlx.core."), array.size, array.nbytes)
            for name, array in self.parameters.items()
        ]
        return [*self.network.base_weights(), *adapter]

    def memory(self) -> MemoryStats:
        return self._meter.read()

    def close(self) -> None:
        """Lets go of the model and of MLX's buffer cache. The second time it does nothing."""
        if self._closed:
            return
        self._closed = True
        mx.synchronize()
        empty: dict[str, Any] = {}
        self.parameters, self._slots = empty, dict(empty)
        del self.network, self._cutter, self._gradients, self._update, self._losses
        gc.collect()
        mx.clear_cache()
        trim_memory()
        self._on_close()


class _Scalar:
    """A device scalar; `float()` waits for it, and reports a lack of memory as what it is."""

    __slots__ = ("_array",)

    def __init__(self, array: mx.array) -> None:
        self._array = array

    def __float__(self) -> float:
        with translate_out_of_memory("a training step"):
            return float(self._array)


def _added(
    sums_so_far: Sums | None, total_so_far: Parameters | None, sums: Sums, gradients: Parameters
) -> tuple[Sums, Parameters]:
    if sums_so_far is None or total_so_far is None:
        return sums, gradients
    sums = tuple(before + own for before, own in zip(sums_so_far, sums, strict=True))
    return sums, {name: total_so_far[name] + gradient for name, gradient in gradients.items()}


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _routed_below(batch: Batch) -> mx.array | None:
    """float32 [2, frozen layers, experts], where the pass begins above these layers."""
    if batch.prefix is None:
        return None
    assert batch.prefix.routed is not None, "a mixture's prefix says where its tokens went"
    return mx.array(batch.prefix.routed)


def _shapes(batches: Sequence[Batch]) -> str:
    rows, width = max((batch.inputs.shape for batch in batches), key=lambda shape: shape[0] * shape[1])
    return f"{len(batches)} x {rows} x {width} tokens"


def _matching(given: Tensors, expected: Mapping[str, mx.array], what: str) -> Parameters:
    """`given` as float32 arrays, if it has exactly the names and shapes of `expected`."""
    wrong = sorted(given.keys() ^ expected.keys())
    wrong += [name for name in given.keys() & expected.keys() if given[name].shape != expected[name].shape]
    if wrong:
        raise UserError(
            f"the {what} to restore does not fit this run: {len(wrong)} tensors are missing, unknown or of "
            f"another shape, such as {wrong[0]}",
            hint="resume with the configuration (lora, optim, model) that the checkpoint was made with",
        )
    return {name: mx.array(given[name].astype(np.float32)) for name in expected}
