"""An adapter folder in another form, proven: every end is run by the library it is for, and the logits are compared.

The written folder is first read back and held against the source, module by module. Then PEFT runs the folder in its
form, mlx-lm the one in its own, on the same rows of the same base model, and what comes out must be equal. An adapter
that a library skips in silence looks like a healthy base model; here it is an error.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.adapter import Adapter
from core.adapter_files import BOTH, AdapterFolder, Form, find_adapter, write_adapter
from core.architecture import Architecture
from core.errors import UserError
from core.files import disk_errors
from core.handoff import HandoffReport, compare_ends, replay_of_logits
from core.protocols import Batch
from core.seeding import generator

Logits = npt.NDArray[np.float32]

LIBRARIES: Mapping[Form, str] = {"peft": "PEFT", "mlx": "mlx-lm"}
FORMS: Mapping[str, tuple[Form, ...]] = {"peft": ("peft",), "mlx": ("mlx",), "both": BOTH}
"""What `--to` means."""
TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference of two logits, as a share of the largest logit (or of 1), by the type of the arithmetic."""
_EFFECT_TOLERANCE = 0.01
"""Largest difference of what the adapter adds to a logit, as a share of the most that it adds to any."""
_ROUNDING = {"float32": 1e-5, "bfloat16": 5e-2}
"""What rounding alone may do to a logit, as a share of the largest one."""


@dataclass(frozen=True, slots=True)
class PeerLogits:
    """For each batch, float32 [targets, vocabulary], in the order of the flattened batch."""

    base: list[Logits]
    adapter: list[Logits]


@dataclass(frozen=True, slots=True)
class Bench:
    """What the ends are held against each other on."""

    batches: Sequence[Batch]
    dtype: str
    """`float32`, or `bfloat16` when the base model fills the memory otherwise."""
    left_out: Mapping[Form, str]
    """Libraries that can't take part here, and why."""
    run: Callable[[Form, Sequence[Path]], list[PeerLogits]]
    """Puts the batches through adapter folders, in the library of a form."""


@dataclass(frozen=True, slots=True)
class End:
    """A folder in one of its forms, as its own library runs it."""

    form: Form
    folder: Path
    logits: PeerLogits
    report: HandoffReport
    """Against the first end; the first against itself."""
    max_difference: float
    """Largest difference of a logit to the first end's."""
    effect: float
    """Largest difference of a logit to the base model's."""
    base_loss: float
    """Nats per target of the base model, in the same library."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was done and what was seen."""

    source: AdapterFolder
    adapter: Adapter
    folder: Path
    forms: tuple[Form, ...]
    ends: tuple[End, ...]
    """The source first, then each written form; without those whose library can't take part."""


def convert(
    source: AdapterFolder,
    adapter: Adapter,
    folder: Path,
    *,
    to: str,
    base_model: str,
    architecture: Architecture,
    bench: Bench,
) -> Conversion:
    """Writes `adapter`, read from `source`, to the new folder `folder`; leaves nothing there unless it is proven.

    Args:
        to: a key of `FORMS`.
        base_model: hub id or path, for the configuration.

    Raises:
        UserError: the folder is taken, no library that could prove it is here, a library refuses the adapter, or the
            ends differ.
    """
    refuse_taken(folder)
    forms = FORMS[to]
    if not {source.form, *forms} - bench.left_out.keys():
        raise UserError(
            f"{source.path}: nothing here can prove the conversion: "
            + "; ".join(f"{LIBRARIES[form]}: {why}" for form, why in bench.left_out.items()),
            hint="convert it where one of the libraries can run the base model",
        )
    with disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_adapter(draft, adapter, base_model=base_model, forms=forms)
        for form in forms:
            _check_values(adapter, find_adapter(draft, form=form).read(architecture), form=form)
        ends = _run_ends(source, draft, forms, bench)
        with disk_errors(folder):
            draft.chmod(0o755)
            draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Conversion(source, adapter, folder, forms, ends)


def refuse_taken(folder: Path) -> None:
    """Raises: UserError: the folder exists and has something in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already", hint="give another folder with --output, or remove it")


def summary(conversion: Conversion, bench: Bench) -> list[str]:
    """The conversion in lines, for the screen."""
    adapter, source = conversion.adapter, conversion.source
    names = " ".join(key.rsplit(".", 1)[-1] for key in adapter.layer_keys)
    ranks = " and ".join(str(rank) for rank in adapter.ranks)
    written = " and ".join(LIBRARIES[form] for form in conversion.forms)
    lines = [
        f"  from     {source.path} · {LIBRARIES[source.form]} · rank {ranks} on {names} in {len(adapter.layers)} of "
        f"{adapter.num_layers} layers",
        f"  to       {conversion.folder} · {written}",
    ]
    lines.append(f"  values   B A of {len(adapter.modules)} modules read back: equal")
    if conversion.ends:
        first = conversion.ends[0]
        lines += [
            f"  logits   {first.report.num_targets} tokens of {first.report.num_rows} rows, {bench.dtype}, "
            "each folder in its own library",
            "                              loss   effect   difference   same token",
            f"           {'base model':<16}{first.base_loss:7.3f}",
        ]
    for end in conversion.ends:
        name = f"{LIBRARIES[end.form]}, {'given' if end.folder == source.path else 'written'}"
        measured = ""
        if end is not conversion.ends[0]:
            agreement = end.report.greedy_agreement
            assert agreement is not None, "both ends were replayed"
            measured = f"{end.max_difference:13.1e}{agreement:13.1%}"
        lines.append(f"           {name:<16}{end.report.target_loss:7.3f}{end.effect:9.3f}{measured}")
    if len(conversion.ends) > 1:
        largest = _size(conversion.ends[0].logits)
        lines.append(f"  equal    each logit to within {TOLERANCES[bench.dtype]:g} of the largest ({largest:.1f})")
    return lines


def unproven(conversion: Conversion, bench: Bench) -> list[str]:
    """A line for each library that the conversion concerns and that could not take part."""
    used = {conversion.source.form, *conversion.forms}
    return [f"not proven in {LIBRARIES[form]}: {why}" for form, why in bench.left_out.items() if form in used]


# --- proving ----------------------------------------------------------------------------------------------------------


def _check_values(source: Adapter, written: Adapter, *, form: Form) -> None:
    """The files hold, for each module, the update `scale * B @ A` that was read; seen by what it does to vectors.

    A half of a fused tensor that is zero comes back as no module.
    """
    for name in source.modules.keys() | written.modules.keys():
        wanted, found = (_effect(adapter, name) for adapter in (source, written))
        difference = float(np.max(np.abs(found - wanted)))
        assert difference <= 1e-5 * max(float(np.max(np.abs(wanted))), 1e-30), f"{form}: {name} is off {difference:.2g}"


def _effect(adapter: Adapter, name: str) -> npt.NDArray[np.float64]:
    """scale * B @ A @ x for eight fixed random vectors x, (..., out, 8); 0 for a module that is not there.

    The product itself, of all experts of a large mixture, would not fit into memory.
    """
    if name not in adapter.modules:
        return np.zeros(1)
    a, b = adapter.matrices(name)
    vectors = generator(0, "convert", a.shape[-1]).normal(size=(a.shape[-1], 8))
    return adapter.scale_of(name) * (b.astype(np.float64) @ (a.astype(np.float64) @ vectors))


def _run_ends(source: AdapterFolder, draft: Path, forms: Sequence[Form], bench: Bench) -> tuple[End, ...]:
    places = [(source.form, source.path), *((form, draft) for form in forms)]
    places = [(form, folder) for form, folder in places if form not in bench.left_out]
    found: dict[tuple[Form, Path], PeerLogits] = {}
    for library in dict.fromkeys(form for form, _ in places):
        folders = [folder for form, folder in places if form == library]
        found |= {(library, folder): one for folder, one in zip(folders, bench.run(library, folders), strict=True)}
    ends: list[End] = []
    for form, folder in places:
        first = found[places[0]]
        ends.append(_end(form, folder, found[form, folder], first, bench))
        problem = _problem(ends[-1], first, bench.dtype)
        if problem is not None:
            name = f"{source.path}" if folder == source.path else f"{source.path} converted for {LIBRARIES[form]}"
            raise UserError(f"{name}: {problem}", hint="nothing was written; is --model the model it was made for?")
    return tuple(ends)


def _end(form: Form, folder: Path, logits: PeerLogits, first: PeerLogits, bench: Bench) -> End:
    source, target, base = (
        replay_of_logits(bench.batches, found) for found in (first.adapter, logits.adapter, logits.base)
    )
    report = compare_ends(source, target, base=base)
    difference, effect = _largest(logits.adapter, first.adapter), _largest(logits.adapter, logits.base)
    return End(form, folder, logits, report, difference, effect, base_loss=float(base.nll.mean()))


def _problem(end: End, first: PeerLogits, dtype: str) -> str | None:
    """What is wrong with an end, in words; None when it is the same as the first."""
    logits, size = end.logits, _size(first)
    effect = _largest(first.adapter, first.base)
    if end.effect == 0.0:
        return f"{LIBRARIES[end.form]} loads it, and it does nothing: the logits are the base model's"
    if not np.isfinite(end.effect):
        return f"{LIBRARIES[end.form]} computes logits that are not numbers"
    base = _largest(logits.base, first.base)
    if base > TOLERANCES[dtype] * size:
        return f"the libraries read the base model differently: without adapter a logit differs by {base:.2g}"
    if end.max_difference > TOLERANCES[dtype] * size:
        return (
            f"a logit differs by {end.max_difference:.2g} from the source's (allowed: {TOLERANCES[dtype] * size:.2g})"
        )
    # a weak adapter hides below the tolerance: what it adds to the logits is compared by itself
    excess = _largest(_changes(logits), _changes(first))
    if excess > max(_EFFECT_TOLERANCE * effect, _ROUNDING[dtype] * size):
        return f"it changes a logit by {excess:.2g} more or less than the source does (at most {effect:.2g})"
    return None


def _size(logits: PeerLogits) -> float:
    """The largest logit of the base model, but at least 1: what differences are a share of."""
    return max(1.0, *(float(np.abs(found).max()) for found in logits.base))


def _changes(logits: PeerLogits) -> list[Logits]:
    return [one - base for one, base in zip(logits.adapter, logits.base, strict=True)]


def _largest(some: Sequence[Logits], others: Sequence[Logits]) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(some, others, strict=True))
