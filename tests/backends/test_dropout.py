"""PyTorch on a CPU: masks of dropout, drawn from what they are for."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from backends.cuda import learner  # noqa: E402
from backends.cuda.dropout import Mask, Masks, drop  # noqa: E402
from backends.cuda.layout import SHARED_START, as_it_is, flatten  # noqa: E402
from core.cutting import take  # noqa: E402
from core.protocols import Batch  # noqa: E402
from tests.backends.conftest import make_batch, open_learner  # noqa: E402
from tests.backends.test_shared_start import shared_batch, with_filler  # noqa: E402

WIDTH = 13


def drawn(batch: Batch, *, num_shared: int = 0, seed: int = 1, rate: float = 0.3, module: str = "q", **of: Any) -> Mask:
    """The mask of [N, WIDTH]."""
    flat = flatten(batch, send=torch.from_numpy, num_shared=num_shared)
    return Masks(seed, flat.extents).draw(torch.zeros(1, flat.shape[1], WIDTH), rate, module, **of)


def factors(mask: Mask) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = mask.factors(torch.zeros(1)).numpy()
    return found


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.1, 0.5, 0.75, 0.99, 0.999])
def test_as_many_are_dropped_as_the_rate_says(rate: float) -> None:
    """Among two million; in each column, in each row and beside each other about as many as chance allows. A row's rate
    is the level below or above, 1/256 apart."""
    num_rows, width = 4000, 512
    mask = Masks(5, [(0, num_rows)]).draw(torch.zeros(num_rows, width), rate, "q")
    dropped = 1 - factors(mask)
    assert set(np.unique(dropped)) == {0.0, 1.0}
    sigma = np.sqrt(rate * (1 - rate))
    assert abs(dropped.mean() - rate) < 5 * sigma / np.sqrt(dropped.size)
    upper = rate * 256 % 1
    for axis, variance in ((0, sigma**2 / num_rows), (1, sigma**2 / width + upper * (1 - upper) / 256**2)):
        assert dropped.mean(axis).std() == pytest.approx(np.sqrt(variance), rel=0.15)
    for step in ((1, 0), (0, 1)):
        apart = dropped - dropped.mean()
        one, other = apart[step[0] :, step[1] :], apart[: num_rows - step[0], : width - step[1]]
        assert abs((one * other).mean()) < 5 * sigma**2 / np.sqrt(dropped.size) + upper * (1 - upper) / 256**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_stays_is_scaled_and_the_gradient_too(dtype: torch.dtype) -> None:
    x = (torch.rand(2, 3, 5, dtype=torch.float64) + 1).to(dtype).requires_grad_()
    masks = Masks(1, [(0, 3), (4, 3)])
    with masks.used():
        found = drop(x, 0.4, "q", training=True)
    kept = masks.draw(x, 0.4, "q").factors(x).view(x.shape)
    assert 0 < kept.sum() < kept.numel() and found.dtype == dtype
    torch.testing.assert_close(found, x * kept / 0.6)
    slope = torch.arange(30, dtype=dtype).view(x.shape)
    found.backward(slope)
    torch.testing.assert_close(x.grad, slope * kept / 0.6)


def test_every_row_module_seed_and_expert_has_its_own() -> None:
    batch = make_batch((20, 20))
    first = factors(drawn(batch))
    np.testing.assert_array_equal(factors(drawn(batch)), first)
    rows = np.split(first, 2)
    others = [factors(drawn(batch, seed=2)), factors(drawn(batch, module="k")), factors(drawn(batch, expert=0))]
    others.append(factors(drawn(batch, expert=1)))
    for one, other in [(rows[0], rows[1]), *((first, other) for other in others), (others[-2], others[-1])]:
        assert 0.3 < (one != other).mean() < 0.55  # 2 * 0.3 * 0.7 on the whole


def test_rows_are_not_alike_however_far_apart() -> None:
    """Streams of one generator that are a power of two apart may be."""
    ids, width = [0, 1, 2, 2**10, 2**17, 2**17 + 1, 2**31], 16 * 8
    mask = factors(Masks(3, [(row, 400) for row in ids]).draw(torch.zeros(len(ids) * 400, width), 0.3, "q"))
    apart = mask.reshape(len(ids), -1) - 0.7
    found = apart @ apart.T / apart.shape[1] / 0.21
    np.testing.assert_allclose(found, np.eye(len(ids)), atol=5 / np.sqrt(apart.shape[1]))


def test_a_row_has_the_same_mask_however_the_batch_is_cut_or_laid_out() -> None:
    batch = with_filler(shared_batch((24, 17, 20), start=9, width=28))
    whole = factors(drawn(batch, num_shared=9))
    start, *rows = np.split(whole, np.cumsum([9, 24 - 9, 17 - 9]))
    for kept in ([0], [2], [0, 2]):
        cut = factors(drawn(take(batch, np.array(kept)), num_shared=9))
        np.testing.assert_array_equal(cut, np.concatenate([start, *(rows[index] for index in kept)]))
    padded = Masks(1, as_it_is(batch).extents).draw(torch.zeros(4, 28, WIDTH), 0.3, "q")
    flat = factors(drawn(batch)).reshape(-1, WIDTH)
    in_rows = factors(padded).reshape(4, 28, WIDTH)
    np.testing.assert_array_equal(np.concatenate([in_rows[0, :24], in_rows[1, :17], in_rows[2, :20]]), flat)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("recomputed", [False, True])
def test_checkpointing_keeps_no_mask(llama: Path, monkeypatch: pytest.MonkeyPatch, bits: int, recomputed: bool) -> None:
    """A mask is a byte for each position and feature of every adapted module: too much for large models."""
    drawn: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def from_numpy(array: Any) -> torch.Tensor:
        if array.dtype == np.uint8 and array.ndim == 2:
            drawn.append(weakref.ref(array))
        return original(array)

    def summed_losses(*args: Any, **kwargs: Any) -> Any:
        """Between the forward and the backward pass."""
        alive.append(sum(one() is not None for one in drawn))
        return losses(*args, **kwargs)

    original, losses = torch.from_numpy, learner.summed_losses
    monkeypatch.setattr(torch, "from_numpy", from_numpy)
    monkeypatch.setattr(learner, "summed_losses", summed_losses)
    train = {"gradient_checkpointing": recomputed}
    opened = open_learner("cuda", llama, lora={"dropout": 0.2}, model={"bits": bits}, train=train)
    opened.train_step([make_batch((7,))], step=1, lr=0.0)
    num_modules = len(opened.export_state().adapter) // 2
    assert len(drawn) == num_modules * (1 + recomputed)
    # in 4 bits q, k and v of the lowest layer keep what was left, and need no mask: nobody asks for a gradient
    assert alive == [0 if recomputed else num_modules - (3 if bits == 4 else 0)]


def test_extents_name_the_positions() -> None:
    batch = with_filler(shared_batch((24, 17, 20), start=9, width=28))
    flat = flatten(batch, send=torch.from_numpy, num_shared=9)
    assert list(flat.extents) == [(SHARED_START, 9), (0, 15), (1, 8), (2, 11)]
    assert sum(count for _, count in flat.extents) == flat.shape[1]


def test_positions_in_no_row_s_order_are_drawn_for_as_they_come() -> None:
    x, masks = torch.ones(4, 50), Masks(1, [(0, 3)])
    with masks.used():
        found = drop(x, 0.5, "q", training=True)
    np.testing.assert_array_equal(found.numpy() > 0, factors(Masks(1, [(0, 4)]).draw(x, 0.5, "q")) > 0)


def test_not_outside_a_training_step() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(AssertionError, match="outside a training step"):
        drop(x, 0.1, "q", training=True)
    with Masks(1, [(0, 4)]).used():
        drop(x, 0.1, "q", training=True)
    with pytest.raises(AssertionError, match="outside a training step"):
        drop(x, 0.1, "q", training=True)
    assert drop(x, 0.0, "q", training=True) is drop(x, 0.1, "q", training=False) is x
