"""One model with an adapter and an optimiser: the step, the evaluation, the state."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from backends.cuda.attention import hands_on_layout
from backends.cuda.dropout import Masks
from backends.cuda.halves import (
    ROWS_AT_A_TIME,
    AbsentLayers,
    FrozenLayers,
    States,
    changes_as_it_runs,
    part_of,
    states_of,
    to_prefix,
)
from backends.cuda.host_layers import HostLayers
from backends.cuda.layout import Flat, as_it_is, flatten
from backends.cuda.loss import host_logits, summed_losses, token_losses, token_replay
from backends.cuda.memory import GPU, memory_stats, within_memory
from backends.cuda.optim import AdamW8bit, add_gradients, from_numpy, gradient, make_optimizer, to_numpy
from backends.cuda.routers import RouterWatch
from backends.cuda.weights import weights_of
from backends.cuda.workers import MOST_PARTS, MOST_UNPACKING, Workers, even_parts, last_ones_in_parts
from core.adapter import split_name, trains_router
from core.config import RunConfig
from core.cutting import target_cost
from core.errors import UserError
from core.protocols import (
    FILLER_ROW,
    IGNORE,
    Batch,
    FloatArray,
    IntArray,
    MemoryStats,
    Prefix,
    Replay,
    RowLosses,
    StepOutput,
    TokenArray,
    TrainState,
    Weight,
)
from core.seeding import step_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Evaluated = tuple[Batch, torch.Tensor, torch.Tensor | None]
"""A batch without its prefix; on the device the cross-entropy of each target, float32 [N], in row order; and of a
mixture the tokens that each expert got, int64 [layers, experts]."""


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows that are trained on together."""

    batch: Batch
    flat: Flat
    masks: Masks


class CudaLearner:
    """`core.protocols.Learner` in PyTorch. Made by `CudaBackend.open`."""

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: dict[str, torch.nn.Parameter],
        *,
        config: RunConfig,
        device: torch.device,
        dtype: torch.dtype,
        num_base_parameters: int,
        description: str,
        frozen: AbsentLayers | None = None,
        stream: bool = False,
    ) -> None:
        """Besides what `CudaBackend.open` knows:

        Args:
            frozen: the layers below the first adapter, if they are not in `model` with their weights.
            stream: the weights of the other layers are in host memory.
        """
        self.model = model
        self.device = device
        self.num_trainable = sum(parameter.numel() for parameter in parameters.values())
        self.num_parameters = num_base_parameters + self.num_trainable
        self.description = description
        self._dtype = dtype
        self._seed = config.train.seed
        self._optim = config.optim
        self._parameters = parameters
        self._optimizer = make_optimizer(self._parameters, config.optim, device=device)
        self._routers = RouterWatch(model)
        self._has_aux_loss = trains_router(name.rpartition(".")[0] for name in parameters)
        self._aux_weight = config.moe.aux_loss_weight
        whole: Any = model
        self._decoder, self._head = whole.model, whole.lm_head
        self.num_prefix_layers = min(split_name(name)[0] for name in parameters)
        self._workers = Workers(device, mode=self._autocast, alone=changes_as_it_runs(self._decoder))
        if frozen is not None:
            frozen.workers = self._workers
        self._frozen = frozen or FrozenLayers(self._decoder, self.num_prefix_layers, self._workers)
        self._is_whole = frozen is None
        self._is_flat = not self._routers and hands_on_layout(self._decoder)
        above = self._decoder.layers[self.num_prefix_layers :]
        self._above = part_of(self._decoder, above, norm=self._decoder.norm)
        self._streamed = HostLayers(self._decoder, list(above), device, self._workers) if stream else None
        # attention's own dropout is torch's: which masks a part gets would depend on which thread asks first
        can_cut = self._is_flat and not getattr(model.config, "attention_dropout", 0.0)
        most = MOST_UNPACKING if config.model.bits == 4 else MOST_PARTS
        self._most_parts = min(most, self._workers.num_threads) if can_cut else 1
        self._target_cost = target_cost(model.config, num_layers=len(above)) if self._most_parts > 1 else 0.0
        model.train()

    @property
    def state_bits(self) -> Literal[8, 32]:
        return 8 if isinstance(self._optimizer, AdamW8bit) else 32

    # --- training

    def train_step(self, microbatches: Sequence[Batch], *, step: int, lr: float) -> StepOutput:
        """One optimiser step over all `microbatches`; `step` counts from 1.

        Nothing in here waits for the device, but that a mixture's layers ask how many tokens each expert has, and that
        streamed layers are copied to it: the outputs are device scalars.

        Raises:
            OutOfMemoryError: the step did not fit.
        """
        num_targets = sum(batch.num_targets for batch in microbatches)
        assert num_targets > 0, "a step without target tokens"
        loss, aux_loss, norm = within_memory(
            lambda: self._accumulate(microbatches, step=step, num_targets=num_targets),
            device=self.device,
            doing=f"in a training step with {_extent(microbatches)}",
        )
        within_memory(lambda: self._optimizer.step(lr), device=self.device, doing="in the optimiser's update")
        return StepOutput(loss=loss, grad_norm=norm, num_targets=num_targets, aux_loss=aux_loss)

    def _accumulate(
        self, microbatches: Sequence[Batch], *, step: int, num_targets: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Leaves the clipped gradient of the whole step in `.grad`.

        Returns the loss, the load-balancing loss if there is one, and the norm before clipping.
        """
        for parameter in self._parameters.values():
            parameter.grad = None
        total, aux_total = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        num_tokens = sum(batch.num_real_tokens for batch in microbatches)
        for index, batch in enumerate(microbatches):
            if batch.num_targets:
                seed = step_seed(self._seed, step, index)
                torch.manual_seed(seed)
                share = batch.num_real_tokens / num_tokens
                nll, aux_loss = self._backward(batch, seed=seed, aux_factor=self._aux_weight * share * num_targets)
                total += nll
                aux_total += share * aux_loss
        gradients = [gradient(parameter) for parameter in self._parameters.values()]
        # Divided here and not in the loss: with float16 the sum's gradients are less likely to vanish.
        torch._foreach_mul_(gradients, 1.0 / num_targets)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._optim.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._optim.max_grad_norm, norm)
        return total / num_targets, aux_total if self._has_aux_loss else None, norm

    def _backward(self, batch: Batch, *, seed: int, aux_factor: float) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Adds the gradient of the batch's objective to `.grad`: summed cross-entropy + factor * load-balancing loss.

        Returns the two losses, each without gradient and factor; 0 for the second where there is none.
        """
        cores, num_shared = self._workers.num_cores, batch.num_shared
        cut = even_parts(batch, most=self._most_parts, cores=cores, target_cost=self._target_cost)
        flats = [self._flat(part, num_shared=num_shared) for part in cut]
        parts = [_Part(part, flat, Masks(seed, flat.extents)) for part, flat in zip(cut, flats, strict=True)]
        if self._streamed is not None:
            return self._backward_streamed(parts, self._streamed), 0.0
        if len(parts) > 1:
            return self._backward_in_parts(parts), 0.0
        with parts[0].masks.used():
            return self._backward_whole(parts[0], aux_factor=aux_factor)

    def _backward_whole(self, part: _Part, *, aux_factor: float) -> tuple[torch.Tensor, torch.Tensor | float]:
        """As `_backward`."""
        with self._autocast():
            with self._routers.watching() if self._has_aux_loss else contextlib.nullcontext():
                hidden, targets = self._at_targets(part.batch, part.flat)
            objective, nll = self._summed_losses(hidden, targets)
            aux_loss = self._aux_loss(part.batch) if self._has_aux_loss else 0.0
        if aux_factor and self._has_aux_loss:
            objective = objective + aux_factor * aux_loss
        objective.backward()
        return nll, aux_loss.detach() if isinstance(aux_loss, torch.Tensor) else aux_loss

    def _backward_in_parts(self, parts: Sequence[_Part]) -> torch.Tensor:
        """As `_backward`: the parts' gradients are taken at once, and added up one after the other."""
        parameters = list(self._parameters.values())

        def of_part(part: _Part) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
            with part.masks.used():
                with self._autocast():
                    objective, nll = self._summed_losses(*self._at_targets(part.batch, part.flat))
                return nll, torch.autograd.grad(objective, parameters)

        found = self._workers.spread(of_part, parts)
        for _, gradients in found:
            add_gradients(parameters, gradients)
        return self._total(nll for nll, _ in found)

    def _backward_streamed(self, parts: Sequence[_Part], layers: HostLayers) -> torch.Tensor:
        """As `_backward_in_parts`, layer by layer; without a load-balancing loss, which `CudaBackend.check` sees to."""
        options, masks = [part.flat.options for part in parts], [part.masks for part in parts]
        states, kept = layers.run_to_train([self._entering(part.batch, part.flat) for part in parts], options, masks)

        def of_head(index: int) -> tuple[torch.Tensor, torch.Tensor]:
            leaving = states[index].requires_grad_()
            with self._autocast():
                normed = self._decoder.norm(leaving)
                gathered = self._gathered(parts[index].batch, parts[index].flat, normed)
                objective, nll = self._summed_losses(*gathered)
            (slope,) = torch.autograd.grad(objective, leaving)
            return nll, slope

        found = self._workers.spread(of_head, range(len(parts)))
        layers.backward(kept, [slope for _, slope in found], options, masks)
        return self._total(nll for nll, _ in found)

    def _summed_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return summed_losses(self._head, hidden, targets, smoothing=self._optim.label_smoothing)

    def _total(self, losses: Iterable[torch.Tensor]) -> torch.Tensor:
        """One after the other, as those of micro-batches are added up."""
        return sum(losses, torch.zeros((), device=self.device))

    def _flat(self, batch: Batch, *, num_shared: int) -> Flat:
        """The positions to compute, those of a shared start once. A mixture's batch stays as it is, since its routers
        are watched over whole rows; so does the batch of a model whose code is not transformers'."""
        if not self._is_flat:
            return as_it_is(batch)
        return flatten(batch, send=self._send, num_shared=num_shared)

    def _entering(self, batch: Batch, flat: Flat) -> torch.Tensor:
        """States [*flat.shape, hidden] that enter the first layer with an adapter."""
        if batch.prefix is not None:
            return self._to_device(flat.states(states_of(batch.prefix, self._dtype)))
        assert self.num_prefix_layers == 0, "a batch without its prefix, and no weights to compute it"
        embedded: torch.Tensor = self._decoder.embed_tokens(self._send(flat.tokens(batch)))
        return embedded

    def _aux_loss(self, batch: Batch) -> torch.Tensor:
        return self._routers.aux_loss(self._send(batch.is_token), self._routed_below(batch))

    def _routed_below(self, batch: Batch) -> torch.Tensor | None:
        """float32 [2, frozen layers, experts] on the device, where the pass watched begins above these layers."""
        if batch.prefix is None:
            return None
        assert batch.prefix.routed is not None, "a mixture's prefix says where its tokens went"
        return self._to_device(torch.from_numpy(batch.prefix.routed))

    def _at_targets(self, batch: Batch, flat: Flat | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Final hidden states [N, hidden] and token ids [N] of the batch's N target positions."""
        flat = flat or self._flat(batch, num_shared=batch.num_shared)
        if self._streamed is not None:
            (leaving,) = self._streamed.run([self._entering(batch, flat)], [flat.options])
            states = self._decoder.norm(leaving)
        elif batch.prefix is not None:
            entering = self._entering(batch, flat)
            states = self._above(inputs_embeds=entering, use_cache=False, **flat.options).last_hidden_state
        else:
            assert self._is_whole, "a batch without its prefix, and no weights to compute it"
            tokens = self._send(flat.tokens(batch))
            states = self._decoder(input_ids=tokens, use_cache=False, **flat.options).last_hidden_state
        return self._gathered(batch, flat, states)

    def _gathered(self, batch: Batch, flat: Flat, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of final states [*flat.shape, hidden] those at targets, and the targets."""
        num_layers = len(self._decoder.layers) - self.num_prefix_layers
        assert flat.layout is None or flat.layout.num_uses >= num_layers, "attention was not told of the layout"
        return (
            states.flatten(0, 1).index_select(0, self._send(flat.targets)),
            self._send(batch.targets.reshape(-1)[target_places(batch)]),
        )

    def _send(self, array: np.ndarray) -> torch.Tensor:
        """int64 copy on the device."""
        return self._to_device(torch.from_numpy(array.astype(np.int64)))

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """To a GPU through pinned memory, without waiting."""
        if self.device.type != GPU:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Lets the float32 adapter compute in the base's type."""
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = torch.autocast(self.device.type, dtype=self._dtype)
        return context

    # --- evaluation

    def evaluate(self, batches: Iterable[Batch]) -> RowLosses:
        """Loss of every row but fillers, in the batches' order, without dropout.

        Raises:
            OutOfMemoryError: a batch did not fit.
        """
        with self.evaluating(), contextlib.closing(self._each_nll(batches)) as evaluated:
            counts_so_far: torch.Tensor | None = None
            pending = []
            for batch, losses, expert_tokens in evaluated:
                pending.append((batch, losses))
                if expert_tokens is not None:
                    counts_so_far = expert_tokens if counts_so_far is None else counts_so_far + expert_tokens
            # device-to-host synchronisation: once, here
            rows = [row_sums(batch, losses.cpu().numpy()) for batch, losses in pending]
        ids, nll, counts = zip(*rows, strict=True) if rows else ((), (), ())
        return RowLosses(
            row_ids=np.concatenate([np.empty(0, np.int64), *ids]),
            nll=np.concatenate([np.empty(0, np.float64), *nll]),
            num_targets=np.concatenate([np.empty(0, np.int64), *counts]),
            expert_tokens=None if counts_so_far is None else counts_so_far.cpu().numpy(),
        )

    def replay(self, batches: Iterable[Batch]) -> Replay:
        """Loss and most likely token of every target, in the batches' order, without dropout.

        Raises:
            OutOfMemoryError: a batch did not fit.
        """
        some, pending = [], []
        with self.evaluating():
            for batch in batches:
                if batch.num_targets:
                    pending.append(self._replay(batch))
                    some.append(replace(batch, prefix=None))
            found = [(nll.cpu().numpy(), greedy.cpu().numpy()) for nll, greedy in pending]
        return Replay.gather(some, [nll for nll, _ in found], [greedy for _, greedy in found])

    def _replay(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return within_memory(
            lambda: token_replay(self._head, *self._at_targets(batch)),
            device=self.device,
            doing=f"in an evaluation with {_extent([batch])}",
        )

    def target_logits(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Float32 [targets, vocabulary] on the host, in the order of the flattened batch, without dropout.

        Raises:
            OutOfMemoryError: the batch did not fit.
        """
        if not batch.num_targets:
            return np.empty((0, self._head.out_features), np.float32)
        with self.evaluating():
            return within_memory(
                lambda: host_logits(self._head, *self._at_targets(batch)),
                device=self.device,
                doing=f"in an evaluation with {_extent([batch])}",
            )

    # --- what never changes

    def prefixes(self, rows: Sequence[TokenArray]) -> Iterator[Prefix]:
        """What the layers below the first adapter make of each row, one row at a time.

        Raises:
            OutOfMemoryError: a row did not fit.
        """
        longest = max(map(len, rows), default=0)
        computing = self._frozen.run(rows, send=self._send)
        while computed := within_memory(
            functools.partial(self._next_below, computing),
            device=self.device,
            doing=f"in the frozen layers with up to {longest} tokens at a time",
        ):
            for states in computed:
                yield to_prefix(*states)

    def _next_below(self, computing: Iterator[States]) -> list[States]:
        """Some rows at a time: to go into evaluation and back takes longer than a short row."""
        with self.evaluating():
            return list(itertools.islice(computing, ROWS_AT_A_TIME))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it: no dropout, no gradients, the compute type. After it: the mode before."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self._autocast():
                yield
        finally:
            self.model.train(was_training)

    def _each_nll(self, batches: Iterable[Batch]) -> Generator[Evaluated, None, None]:
        """The batches evaluated, in order. Watched routers and streamed layers take one at a time."""
        one_at_a_time = self._routers or self._streamed is not None
        if one_at_a_time:
            yield from map(self._nll, batches)
        else:
            yield from self._workers.map(self._nll, last_ones_in_parts(batches, at_once=self._workers.num_threads))

    @property
    def _side_by_side(self) -> str:
        number = self._workers.num_threads
        return f", {number} batches side by side" if number > 1 else ""

    def _nll(self, batch: Batch) -> Evaluated:
        without = replace(batch, prefix=None)  # or the whole store would be in memory
        if batch.num_targets == 0:
            return without, torch.empty(0), None
        with self._routers.watching():
            losses = within_memory(
                lambda: token_losses(self._head, *self._at_targets(batch)),
                device=self.device,
                doing=f"in an evaluation with {_extent([batch])}{self._side_by_side}",
            )
        if not self._routers:
            return without, losses, None
        return without, losses, self._routers.expert_tokens(self._send(batch.is_token), self._routed_below(batch))

    # --- state

    def export_state(self) -> TrainState:
        """Adapter and moments as copies on the host, bit for bit."""
        return TrainState(
            adapter={name: to_numpy(p) for name, p in self._parameters.items()},
            optimizer=self._optimizer.export_slots(),
            optimizer_steps=self._optimizer.num_steps,
        )

    def import_state(self, state: TrainState) -> None:
        """Continues from `state`.

        Raises:
            UserError: the state of another adapter or another optimiser.
        """
        if state.adapter.keys() != self._parameters.keys():
            raise UserError(
                "the checkpoint's adapter has other modules than this run's",
                hint="resume with the lora settings that the checkpoint was made with",
            )
        values = {n: from_numpy(state.adapter[n], like=p) for n, p in self._parameters.items()}
        self._optimizer.import_slots(state.optimizer, num_steps=state.optimizer_steps)
        for name, parameter in self._parameters.items():
            parameter.data.copy_(values[name])

    def weights(self) -> list[Weight]:
        """Every tensor of base and adapter, once; a packed one with its scales."""
        return list(weights_of(self.model, self._parameters))

    def memory(self) -> MemoryStats:
        return memory_stats(self.device)

    def close(self) -> None:
        """Lets go of the model and its memory; the learner is of no use afterwards."""
        self._workers.close()
        for name in ("model", "_decoder", "_frozen", "_above", "_streamed", "_head", "_parameters", "_optimizer"):
            setattr(self, name, None)
        gc.collect()  # a 4-bit layer and its weight hold each other
        if self.device.type == GPU:
            torch.cuda.empty_cache()


def target_places(batch: Batch) -> IntArray:
    """int64 [N]: the target positions in the flattened batch, row after row; found on the host, so nothing waits."""
    return np.flatnonzero(batch.targets.reshape(-1) != IGNORE)


def row_sums(batch: Batch, losses: np.ndarray) -> tuple[IntArray, FloatArray, IntArray]:
    """Ids, summed losses (float64) and target counts of the batch's rows without fillers, from the losses [N]."""
    num_rows, width = batch.targets.shape
    rows = target_places(batch) // width
    nll = np.bincount(rows, weights=losses, minlength=num_rows)
    counts = np.bincount(rows, minlength=num_rows)
    real = batch.row_ids != FILLER_ROW
    return batch.row_ids[real].astype(np.int64), nll[real], counts[real].astype(np.int64)


def _extent(batches: Sequence[Batch]) -> str:
    rows, width = max((batch.inputs.shape for batch in batches), key=lambda s: s[0] * s[1])
    return f"{rows} x {width} tokens at a time"
