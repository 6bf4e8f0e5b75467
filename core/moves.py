"""Moving a run: going on with another backend, on another machine, or with its folders in other places.

What a run computes is bound to its model, data and settings; where it computes is not. This module decides where a
resumed run goes on (`choose_backend`), keeps what the steps before were computed on (`Place`, `Move`), says what can't
be the same there (`differences`), and has held-out rows replayed at the new place before a step is taken (`verify`).
A checkpoint holds its place and the moves so far, so all of it survives what happens to the other files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from core.adapter import Adapter
from core.architecture import Architecture
from core.checkpoint import Checkpoint, Checkpointer
from core.config import RunConfig
from core.errors import UserError
from core.handoff import HandoffReport, check_rows
from core.models.fingerprint import model_traits
from core.models.reference import original_of
from core.optimizer_state import is_adamw, is_eight_bit
from core.protocols import Batch, DeviceReport, Learner, RowLosses
from core.row_losses import read_row_losses

PLACE = "place"
"""Under this name a checkpoint's trainer.json holds its place, and in it `MOVES`."""
MOVES = "moves"
MAX_LOSS_DIFFERENCE = 0.5
"""Nats per target between a replayed validation loss and what was measured before, from which a run does not go on: no
rounding of the same model explains so much."""
FOUR_BITS = {"mlx": "MLX's affine groups of 64", "cuda": "NF4"}
LIBRARY = {"mlx": "MLX", "cuda": "PyTorch"}

Probe = Callable[[str, str], DeviceReport]
"""Backend and device, as the settings name them -> what is there."""


@dataclass(frozen=True, slots=True)
class Move:
    """A stretch of a run that was computed in one place."""

    backend: str
    device: str
    """For people: `Apple M3 Max`."""
    from_step: int
    """The step that it went on from; its first step is the next."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where steps are computed, as far as it decides what comes out."""

    backend: str
    device: str
    accelerator: bool
    compute: str
    """Compute type: `float32`, `bfloat16` or `float16`."""
    bits: int
    """`model.bits`."""
    architecture: Mapping[str, Any]
    """The fields of `core.architecture.Architecture`."""
    traits: Mapping[str, Any] = field(default_factory=dict)
    """`core.models.fingerprint.model_traits`; empty in checkpoints of earlier versions."""

    @classmethod
    def of(
        cls, config: RunConfig, device: DeviceReport, architecture: Architecture, *, folder: Path | None = None
    ) -> Place:
        """`folder` is the model's, where there is one."""
        auto = "bfloat16" if device.accelerator else "float32"
        return cls(
            backend=config.backend,
            device=device.device,
            accelerator=device.accelerator,
            compute=auto if config.model.dtype == "auto" else config.model.dtype,
            bits=config.model.bits,
            architecture=asdict(architecture),
            traits={} if folder is None else model_traits(folder),
        )

    @property
    def mlx_bits(self) -> int | None:
        """Bits of an MLX-quantised folder; None for ordinary weights."""
        bits: int | None = self.architecture.get("mlx_bits")
        return bits

    @property
    def is_four_bit(self) -> bool:
        return self.bits == 4 or self.mlx_bits is not None

    def has_base_of(self, other: Place) -> bool:
        """Whether the frozen weights have the same values, for the same model folder."""
        if self.mlx_bits != other.mlx_bits:
            return False
        return self.backend == other.backend or not self.is_four_bit

    def measures_as(self, other: Place) -> bool:
        """Whether losses measured in the two places can be compared: the same weights in the same precision."""
        return self.has_base_of(other) and self.compute == other.compute

    def to_dict(self, moves: Sequence[Move]) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {**asdict(self), MOVES: plain(moves)}


def place_of(checkpoint: Checkpoint) -> Place | None:
    """Where the checkpoint was made; None for one that does not say."""
    saved = checkpoint.trainer.get(PLACE)
    return None if saved is None else Place(**{name: value for name, value in saved.items() if name != MOVES})


def plain(moves: Sequence[Move]) -> list[dict[str, Any]]:
    """As JSON holds them."""
    return [asdict(move) for move in moves]


def moves_of(checkpoint: Checkpoint, state: Mapping[str, Any]) -> tuple[Move, ...]:
    """Where the steps up to the checkpoint were computed: as it says, else as the state file does."""
    saved = checkpoint.trainer.get(PLACE) or {}
    if MOVES in saved:
        return tuple(Move(**move) for move in saved[MOVES])
    return (Move(str(state.get("backend", "unknown")), str(state.get("device", "unknown")), 0),)


def moved_to(moves: Sequence[Move], place: Place, *, from_step: int) -> tuple[Move, ...]:
    """The stretches with the one that begins now; what was computed after `from_step` is lost and left out."""
    kept = [move for move in moves if move.from_step < from_step]
    if kept and (kept[-1].backend, kept[-1].device) == (place.backend, place.device):
        return tuple(kept)
    return (*kept, Move(place.backend, place.device, from_step))


def backend_at(moves: Sequence[Move], step: int) -> str:
    """The backend that evaluated `step`."""
    before = [move for move in moves if move.from_step < step]
    return (before or list(moves))[-1 if before else 0].backend


# --- choosing where to go on ------------------------------------------------------------------------------------------


def choose_backend(
    config: RunConfig, *, written: str, typed: Collection[str], probe: Probe, names: Sequence[str]
) -> tuple[RunConfig, list[str]]:
    """Settings for a backend and a device that are there, and a line for each that had to give way.

    A backend that can't train here gives way to one that can; a GPU that is missing, to a CPU only when the backend
    moved. What was typed stays. Where nothing fits, the settings stay too, and opening them says what is missing.

    Args:
        config: of the run, with what was typed.
        written: the backend in the run's config.yaml.
        typed: dotted names of the settings that were typed.
        names: every backend there is.

    Raises:
        UserError: the run's model is in a form that only the backend it comes from can read.
    """
    found = probe(config.backend, config.device)
    config = config.model_copy(update={"backend": found.backend})
    if not found.available:
        for name, device in _candidates(config, written=written, typed=typed, probe=probe, names=names):
            if (other := probe(name, device)).available:
                notes = list(_given_way(config, found, other, device))
                config = config.model_copy(update={"backend": name, "device": device})
                _refuse_form_of_mlx(config, written=written, typed=typed)
                return config, notes
    _refuse_form_of_mlx(config, written=written, typed=typed)
    return config, []


def _candidates(
    config: RunConfig, *, written: str, typed: Collection[str], probe: Probe, names: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Backends and devices to go on with instead, in the order of preference."""
    any_device = ("auto",) if "device" not in typed and config.device != "auto" else ()
    if "backend" in typed:
        if config.backend != written:
            yield from ((config.backend, device) for device in any_device)
        return
    others = [name for name in names if name != config.backend]
    yield from ((name, config.device) for name in others)
    if any_device and not probe(config.backend, "auto").available:
        yield from ((name, device) for name in others for device in any_device)


def _given_way(config: RunConfig, found: DeviceReport, other: DeviceReport, device: str) -> Iterator[str]:
    if other.backend != found.backend:
        yield f"backend {found.backend}: {found.problem}; going on with {other.backend}"
    if device != config.device:
        yield f"device {config.device}: not here with {other.backend}; going on with {other.device}"


def _refuse_form_of_mlx(config: RunConfig, *, written: str, typed: Collection[str]) -> None:
    """Before gigabytes are downloaded that can't be read."""
    if config.backend == written or config.backend == "mlx" or "model.path" in typed:
        return
    if (original := original_of(config.model.path)) is not None:
        raise UserError(
            f"{config.model.path}: MLX's own 4-bit weights, which {config.backend} can't read",
            hint=f"go on with the original model: --model {original}",
        )


# --- what is the same there, and what is not --------------------------------------------------------------------------


def is_other_rounding(before: Place | None, now: Place) -> bool:
    """Whether two model folders that differ may be one model in two forms: MLX's 4-bit weights, and the original.

    Only for a run that moved to another backend. Shapes are no proof: `other_traits` says what else is known of
    the two, and `arrive` judges the losses.
    """
    if before is None or before.backend == now.backend or before.mlx_bits is now.mlx_bits is None:
        return False
    return _without_bits(before) == _without_bits(now)


def other_traits(before: Place, now: Place) -> list[str]:
    """`rope theta 10000 there, 500000 here`, for what both model folders say and say differently."""
    shared = [name for name in before.traits if name in now.traits and before.traits[name] != now.traits[name]]
    return [
        "another tokenizer" if name == "tokenizer" else f"{name} {_said(before, name)} there, {_said(now, name)} here"
        for name in shared
    ]


def _said(place: Place, name: str) -> str:
    value = place.traits[name]
    return f"{value:g}" if isinstance(value, float) else str(value or "none")


def _without_bits(place: Place) -> dict[str, Any]:
    return {name: value for name, value in place.architecture.items() if name != "mlx_bits"}


def differences(before: Place | None, now: Place, config: RunConfig) -> Iterator[str]:
    """What can't carry over between the two places, of what this run has: a line each."""
    if before is None:
        return
    moved = before.backend != now.backend
    if config.lora.dropout and moved:
        yield f"dropout masks: {LIBRARY[now.backend]} draws others than {LIBRARY[before.backend]} from the same seed"
    elif config.lora.dropout and now.backend == "cuda" and before.accelerator != now.accelerator:
        yield "dropout masks: PyTorch draws others on a GPU than on a CPU from the same seed"
    if moved and (before.is_four_bit or now.is_four_bit):
        yield f"4-bit base: {_rounding(before)} there, {_rounding(now)} here: the weights are rounded differently"
    if before.compute != now.compute:
        yield f"compute type: {before.compute} there, {now.compute} here"


def _rounding(place: Place) -> str:
    return FOUR_BITS[place.backend] if place.is_four_bit else "16-bit weights"


def moments_note(checkpoint: Checkpoint, *, keeps_bits: int) -> str | None:
    """What the optimiser at hand does to AdamW's moments, if it keeps them in another precision."""
    moments = f"the moments of step {checkpoint.step}"
    if keeps_bits == 32 and is_eight_bit(checkpoint.state.optimizer):
        return f"optim.state_bits 8: {moments} were dequantised to 32 bits"
    if keeps_bits == 8 and is_adamw(checkpoint.state.optimizer):
        return f"optim.state_bits 8: {moments}, kept in 32 bits so far, were quantised to 8"
    return None


# --- the proof --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replayed:
    """Rows of an evaluated step, as measured then and here."""

    step: int
    report: HandoffReport


@dataclass(frozen=True, slots=True)
class Arrival:
    """A run at the place where it goes on."""

    moves: tuple[Move, ...]
    lines: tuple[str, ...] = ()
    """For people, each with a heading of at most eight letters."""
    warnings: tuple[str, ...] = ()
    is_other_base: bool = False
    """Whether losses from before were measured on other weights or in another compute type."""

    def is_measured_here(self, step: int) -> bool:
        """Whether `step` was evaluated since the last move."""
        return len(self.moves) == 1 or step > self.moves[-1].from_step


def arrive(
    checkpoint: Checkpoint,
    place: Place,
    *,
    state: Mapping[str, Any],
    config: RunConfig,
    learner: Learner,
    verify: Callable[[], Replayed | None],
) -> Arrival:
    """What changes for a run that goes on from `checkpoint` at `place`; where something does, rows are replayed.

    The learner holds any state afterwards; the trainer restores the checkpoint's.

    Args:
        state: content of the run's state file, for checkpoints that don't say where they were made.
        verify: replays rows, as `replay_last_evaluation`.

    Raises:
        UserError: the replayed loss is another model's.
    """
    before, moves = place_of(checkpoint), moves_of(checkpoint, state)
    after = moved_to(moves, place, from_step=checkpoint.step)
    note = moments_note(checkpoint, keeps_bits=learner.state_bits)
    differs = [*differences(before, place, config), *([] if note is None else [note])]
    lines = [f"differs  {line}" for line in differs]
    last = moves[-1]
    if (last.backend, last.device) == (place.backend, place.device) and not differs:
        return Arrival(after)
    if after != moves:
        lines.insert(0, f"moved    from {last.backend} on {last.device} to {place.backend} on {place.device}")
    other_base = last.backend != place.backend if before is None else not place.measures_as(before)
    check = verify()
    if check is None:
        nothing = "hand-off: no losses measured before are there to hold this end against"
        return Arrival(after, tuple(lines), (nothing,), is_other_base=other_base)
    source = backend_at(moves, check.step)
    _refuse_other_model(check, source=source, start=config.start, state=state)
    lines.append(f"hand-off {said(check, source=source, start=config.start)}")
    exact = before is not None and is_exact(before, place) and Arrival(moves).is_measured_here(check.step)
    problem = check.report.problem(exact=exact)
    warnings = () if problem is None else (f"hand-off: {problem}",)
    return Arrival(after, tuple(lines), warnings, is_other_base=other_base)


def _refuse_other_model(check: Replayed, *, source: str, start: str, state: Mapping[str, Any]) -> None:
    """However alike the files are: a loss this far off is not what the run was trained on."""
    difference = abs(check.report.loss_difference)
    if difference <= MAX_LOSS_DIFFERENCE:
        return
    nothing = "; the adapter does not change the output of the base model here" if check.report.does_nothing else ""
    model = state.get("model")
    same = f"give the model that it was trained on{f' ({model})' if model else ''}, in any rounding, with --model"
    raise UserError(
        f"hand-off {said(check, source=source, start=start)}: {difference:.2f} nats apart, more than the "
        f"{MAX_LOSS_DIFFERENCE:g} that another rounding explains{nothing}",
        hint=f"{same}; or go on where it was, with --backend {source}",
    )


def is_exact(before: Place, now: Place) -> bool:
    """Whether both places should give the same losses, to rounding in float32."""
    return before.compute == now.compute == "float32" and now.has_base_of(before)


def said(check: Replayed, *, source: str, start: str) -> str:
    """The check in a line. `start` is what the run has before its first step."""
    what = f"step {check.step}" if check.step else start
    report = check.report
    rows = f"{report.num_rows} row{'s' if report.num_rows > 1 else ''}"
    return (
        f"{what}: validation loss {report.source_loss:.3f} on {source}, {report.target_loss:.3f} here "
        f"({rows}; largest difference of a row {report.max_difference:.2g})"
    )


def replay_last_evaluation(
    checkpoint: Checkpoint,
    *,
    run_folder: Path,
    checkpointer: Checkpointer,
    learner: Learner,
    initial: Adapter,
    validation: Sequence[Batch],
) -> Replayed | None:
    """Holds rows of the last evaluated step that has a checkpoint against what was measured then.

    Before the first such step it is the base model, or the initial adapter, as measured before training; None when
    nothing was measured. The learner is left with that step's adapter and a fresh optimiser.
    """
    step, adapter, measured = _last_evaluation(checkpoint, run_folder, checkpointer, initial)
    return None if measured is None else Replayed(step, check_rows(learner, adapter, validation, measured))


def _last_evaluation(
    checkpoint: Checkpoint, run_folder: Path, checkpointer: Checkpointer, initial: Adapter
) -> tuple[int, Adapter, RowLosses | None]:
    for step in sorted(checkpointer.steps(), reverse=True):
        if step > checkpoint.step or (measured := _measured(run_folder, step)) is None:
            continue
        saved = checkpoint if step == checkpoint.step else checkpointer.read(step)
        if saved is not None:
            tensors: Any = saved.state.adapter
            return step, initial.with_tensors(tensors), measured
    return 0, initial, _measured(run_folder, 0)


def _measured(run_folder: Path, step: int) -> RowLosses | None:
    from safetensors import SafetensorError

    try:
        losses = read_row_losses(run_folder, step)
    except (SafetensorError, OSError, KeyError):  # it proves the move; the run does not need it
        return None
    return None if losses is None else losses[0]
