"""Checkpoints appear whole or not at all, damage is found, and there is always one to fall back on."""

from __future__ import annotations

import builtins
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from core.checkpoint import ADAPTER, FOLDER, MANIFEST, OPTIMIZER, TRAINER, Checkpoint, Checkpointer, damage
from core.errors import UserError
from core.protocols import TrainState

FILES = (ADAPTER, OPTIMIZER, TRAINER, MANIFEST)


def state_of(step: int) -> TrainState:
    """Numbers that tell the step."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4) + step
    return TrainState(
        adapter={"a.lora_A": values, "a.lora_B": -values},
        optimizer={"exp_avg/a.lora_A": values * 0.5, "qmap1/a.lora_A": np.arange(5, dtype=np.uint8)},
        optimizer_steps=step,
    )


def save(checkpointer: Checkpointer, step: int, *, best: int | None = None, tag: str = "") -> Path:
    return checkpointer.save(state_of(step), {"step": step, "tag": tag}, step=step, epoch=1, best_step=best)


def is_state_of(checkpoint: Checkpoint | None, step: int) -> bool:
    assert checkpoint is not None
    expected = state_of(step)
    assert checkpoint.state.adapter.keys() == expected.adapter.keys()
    assert checkpoint.state.optimizer.keys() == expected.optimizer.keys()
    return (
        checkpoint.step == step
        and checkpoint.trainer["step"] == step
        and checkpoint.state.optimizer_steps == step
        and all(np.array_equal(checkpoint.state.adapter[n], t) for n, t in expected.adapter.items())
        and all(np.array_equal(checkpoint.state.optimizer[n], t) for n, t in expected.optimizer.items())
    )


# --- what is written --------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    trainer = {"progress": {"step": 7, "loss": 0.1}, "best": None}
    path = Checkpointer(tmp_path, keep=1).save(state_of(7), trainer, step=7, epoch=2, best_step=7)
    assert path == tmp_path / FOLDER / "epoch2_step7"
    checkpoint = Checkpointer(tmp_path, keep=1).latest()
    assert checkpoint is not None
    assert checkpoint.path == path
    assert checkpoint.trainer == trainer
    for name, tensor in {**state_of(7).adapter, **state_of(7).optimizer}.items():
        saved = {**checkpoint.state.adapter, **checkpoint.state.optimizer}[name]
        assert saved.dtype == tensor.dtype
        np.testing.assert_array_equal(saved, tensor)


def test_it_is_safetensors_and_json_and_nothing_else(tmp_path: Path) -> None:
    path = save(Checkpointer(tmp_path, keep=1), 3, best=3)
    assert sorted(os.listdir(path)) == sorted(FILES)
    for name in FILES:
        if name.endswith(".json"):
            json.loads((path / name).read_text())
        else:
            assert load_file(path / name)
    assert os.listdir(tmp_path / FOLDER) == [path.name]


def test_the_manifest_has_sizes_and_checksums_that_other_tools_agree_with(tmp_path: Path) -> None:
    import hashlib

    path = save(Checkpointer(tmp_path, keep=1), 3)
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["format"] == 1
    for name in (ADAPTER, OPTIMIZER, TRAINER):
        content = (path / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_views_are_saved_as_what_they_show(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    adapter = {
        "transposed": values.T,
        "strided": values[::2, 1::2],
        "reversed": values[::-1],
        "fortran": np.asfortranarray(values),
    }
    optimizer = {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.float32)}
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(TrainState(adapter, optimizer, 1), {}, step=1, epoch=1, best_step=None)
    checkpoint = checkpointer.latest()
    assert checkpoint is not None
    for name, tensor in adapter.items():
        np.testing.assert_array_equal(checkpoint.state.adapter[name], tensor)
    for name, tensor in optimizer.items():
        assert checkpoint.state.optimizer[name].shape == tensor.shape
        np.testing.assert_array_equal(checkpoint.state.optimizer[name], tensor)


def test_an_optimiser_without_state(tmp_path: Path) -> None:
    """SGD without momentum has none."""
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(TrainState(state_of(1).adapter, {}, 5), {}, step=5, epoch=1, best_step=None)
    checkpoint = checkpointer.latest()
    assert checkpoint is not None
    assert checkpoint.state.optimizer == {}
    assert checkpoint.state.optimizer_steps == 5


def test_a_trainer_state_that_json_does_not_know_is_refused(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1)
    with pytest.raises(ValueError, match="JSON"):
        checkpointer.save(state_of(1), {"loss": float("nan")}, step=1, epoch=1, best_step=None)
    assert Checkpointer(tmp_path, keep=1).latest() is None


# --- a crash at every file operation ----------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


class CrashAt:
    """Lets `count` file operations pass, then ends the process before or after the next one."""

    NAMES = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "open")

    def __init__(self, patch: pytest.MonkeyPatch, count: float, *, after: bool) -> None:
        self.left, self.after, self.dead = count, after, False
        for name in self.NAMES:
            patch.setattr(os, name, self._wrapped(getattr(os, name)))
        patch.setattr(builtins, "open", self._wrapped(builtins.open))

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.dead:
                raise Killed
            self.left -= 1
            if self.left >= 0:
                return real(*arguments, **options)
            self.dead = True
            if self.after:
                real(*arguments, **options)
            raise Killed

        return call


def crashes(
    tmp_path: Path, before: Callable[[Path], None], action: Callable[[Checkpointer], object], *, keep: int, after: bool
) -> list[Checkpoint | None]:
    """What `latest` finds after a crash at the first, second, third... file operation of `action`."""
    found: list[Checkpoint | None] = []
    for count in range(1000):
        folder = tmp_path / str(count)
        folder.mkdir()
        before(folder)
        checkpointer = Checkpointer(folder, keep=keep)
        killed = False
        with pytest.MonkeyPatch.context() as patch:
            CrashAt(patch, count, after=after)
            try:
                action(checkpointer)
            except Killed:
                killed = True
        again = Checkpointer(folder, keep=keep)
        found.append(again.latest())
        assert [name for name in os.listdir(folder / FOLDER) if name.startswith(".")] == []
        save(again, 999)  # and it goes on
        assert is_state_of(again.latest(), 999)
        if not killed:
            return found
    raise AssertionError("the action has no end")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_while_saving_leaves_the_old_state_or_the_new(tmp_path: Path, after: bool) -> None:
    def before(folder: Path) -> None:
        checkpointer = Checkpointer(folder, keep=2)
        save(checkpointer, 10, best=10)
        save(checkpointer, 20, best=10)

    # the third pushes out the first: pruning is under fire too
    found = crashes(tmp_path, before, lambda c: save(c, 30, best=30), keep=2, after=after)
    assert len(found) > 12
    assert all(is_state_of(one, 20) or is_state_of(one, 30) for one in found)
    assert is_state_of(found[0], 20)
    assert is_state_of(found[-1], 30)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_while_the_only_checkpoint_is_replaced(tmp_path: Path, after: bool) -> None:
    found = crashes(
        tmp_path,
        lambda folder: void(save(Checkpointer(folder, keep=1), 10, tag="old")),
        lambda c: save(c, 10, tag="new"),
        keep=1,
        after=after,
    )
    tags = [one.trainer["tag"] if one else None for one in found]
    assert set(tags) == {"old", "new"}
    assert tags == sorted(tags, reverse=True)  # old, …, old, new, …, new


def void(_: object) -> None: ...


def test_a_write_that_ends_half_way(tmp_path: Path) -> None:
    """Leftovers of a killed process do not stand in the way and are removed; other people's files are left alone."""
    save(Checkpointer(tmp_path, keep=1), 10)
    folder = tmp_path / FOLDER
    shutil.copytree(folder / "epoch1_step10", folder / ".epoch1_step20.tmp")
    (folder / ".epoch1_step20.tmp" / MANIFEST).unlink()
    shutil.copytree(folder / "epoch1_step10", folder / ".epoch1_step5.old")
    (folder / ".epoch1_step5.old" / ADAPTER).unlink()
    (folder / ".DS_Store").write_bytes(b"the Finder was here")
    checkpointer = Checkpointer(tmp_path, keep=1)
    assert sorted(os.listdir(folder)) == [".DS_Store", "epoch1_step10"]
    assert is_state_of(checkpointer.latest(), 10)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("operation", ["write", "fsync", "mkdir", "rename"])
def test_a_full_disk_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, number: int
) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1)
    save(checkpointer, 10)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        target = "core.checkpoint._write_durably" if operation == "write" else f"os.{operation}"
        patch.setattr(target, full)
        with pytest.raises(UserError, match="the disk is full"):
            save(checkpointer, 20)
    assert os.listdir(tmp_path / FOLDER) == ["epoch1_step10"]  # the half one gives its space back
    assert is_state_of(checkpointer.latest(), 10)
    save(checkpointer, 20)
    assert is_state_of(checkpointer.latest(), 20)


def test_everything_is_synchronised_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[int | str] = []
    rename = os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", lambda *names: (events.append("rename"), rename(*names))[1])
    path = save(Checkpointer(tmp_path, keep=1), 10)
    at = events.index("rename")
    assert set(events[:at]) == {entry.stat().st_ino for entry in (path, *path.iterdir())}
    assert events[at + 1 :] == [(tmp_path / FOLDER).stat().st_ino]


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(position: float) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return spoil


SPOILS: dict[str, Callable[[Path], None]] = {
    "first byte": flip(0),
    "middle byte": flip(0.5),
    "last byte": flip(1),
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 2),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: void(path.write_bytes(path.read_bytes() + b" ")),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir())[1],
}


@pytest.mark.parametrize(
    ("name", "spoil"),
    # white space behind JSON, which both would change, is no damage
    [(n, s) for n in FILES for s in SPOILS if n != MANIFEST or s not in ("longer", "last byte")],
)
def test_damage_is_found_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str, spoil: str
) -> None:
    monkeypatch.setattr(logging.getLogger("twinkeel"), "propagate", True)
    checkpointer = Checkpointer(tmp_path, keep=3)
    save(checkpointer, 10)
    path = save(checkpointer, 20)
    assert damage(path) is None
    SPOILS[spoil](path / name)
    found = damage(path)
    assert found is not None
    assert name in found or (name == MANIFEST and "format" in found)
    assert checkpointer.read(20) is None
    with caplog.at_level(logging.WARNING, "twinkeel"):
        assert is_state_of(checkpointer.latest(), 10)
    assert "epoch1_step20" in caplog.text
    assert "damaged" in caplog.text
    assert checkpointer.steps() == [10]


def test_a_flipped_bit_anywhere_in_the_manifest_is_found_or_harmless(tmp_path: Path) -> None:
    """The manifest has no checksum of its own, so no change of it may lead to anything but a whole checkpoint."""
    checkpointer = Checkpointer(tmp_path, keep=2)
    save(checkpointer, 10)
    path = save(checkpointer, 20, best=10)
    manifest = path / MANIFEST
    content = manifest.read_bytes()
    num_found = 0
    for position in range(len(content)):
        for bit in (0, 5):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            manifest.write_bytes(changed)
            if damage(path) is None:
                assert json.loads(changed) == json.loads(content)  # white space
            else:
                num_found += 1
    assert num_found > len(content)
    manifest.write_bytes(content)
    assert is_state_of(checkpointer.latest(), 20)


def test_a_checkpoint_whose_best_one_is_damaged_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("twinkeel"), "propagate", True)
    checkpointer = Checkpointer(tmp_path, keep=4)
    save(checkpointer, 10, best=10)
    best = save(checkpointer, 20, best=20)
    save(checkpointer, 30, best=20)
    flip(0.5)(best / ADAPTER)
    with caplog.at_level(logging.WARNING, "twinkeel"):
        assert is_state_of(checkpointer.latest(), 10)
    assert "step 20" in caplog.text
    assert checkpointer.steps() == [10]


def test_falling_back_still_works_after_a_new_best(tmp_path: Path) -> None:
    """Step 20 counts on the best adapter of step 10; a new best at step 30 must not take that away from it."""
    checkpointer = Checkpointer(tmp_path, keep=2)
    save(checkpointer, 10, best=10)
    save(checkpointer, 15, best=10)
    save(checkpointer, 20, best=10)
    newest = save(checkpointer, 30, best=30)
    assert checkpointer.steps() == [10, 20, 30]
    flip(0.5)(newest / OPTIMIZER)
    assert is_state_of(checkpointer.latest(), 20)


def test_all_damaged_is_none(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=4)
    for step in (10, 20):
        (save(checkpointer, step) / ADAPTER).unlink()
    assert checkpointer.latest() is None
    # set aside, not lost
    assert sorted(os.listdir(tmp_path / FOLDER)) == ["epoch1_step10.damaged", "epoch1_step20.damaged"]


def test_none_at_first(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1)
    assert checkpointer.latest() is None
    assert checkpointer.steps() == []
    assert checkpointer.read(10) is None


# --- keeping ----------------------------------------------------------------------------------------------------------


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (10, 20, 30, 40, 100):
        save(checkpointer, step, best=20 if step >= 20 else 10)
    assert checkpointer.steps() == [20, 40, 100]
    assert is_state_of(checkpointer.read(20), 20)
    save(checkpointer, 110, best=110)
    save(checkpointer, 120, best=110)
    assert checkpointer.steps() == [110, 120]


def test_steps_are_ordered_as_numbers_across_epochs(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step, epoch in ((9, 1), (100, 10), (20, 2)):
        checkpointer.save(state_of(step), {"step": step}, step=step, epoch=epoch, best_step=None)
    assert checkpointer.steps() == [20, 100]
    assert is_state_of(checkpointer.latest(), 100)


def test_other_folders_are_not_checkpoints(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1)
    (tmp_path / FOLDER / "epoch1_step99 copy").mkdir()
    (tmp_path / FOLDER / "notes").mkdir()
    save(checkpointer, 10)
    save(checkpointer, 20)
    assert checkpointer.steps() == [20]
    assert {"notes", "epoch1_step99 copy"} < set(os.listdir(tmp_path / FOLDER))
