"""PyTorch on a CPU: masks of dropout, drawn from what they are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from backends.cuda.dropout import Mask, Masks, dropout  # noqa: E402
from backends.cuda.layout import SHARED_START, as_it_is, flatten  # noqa: E402
from core.cutting import take  # noqa: E402
from core.protocols import Batch  # noqa: E402
from tests.backends.conftest import make_batch  # noqa: E402
from tests.backends.test_shared_start import shared_batch, with_filler  # noqa: E402

WIDTH = 13


def drawn(batch: Batch, *, num_shared: int = 0, seed: int = 1, rate: float = 0.3, place: int = 2, **of: Any) -> Mask:
    """The mask of [N, WIDTH]."""
    flat = flatten(batch, send=torch.from_numpy, num_shared=num_shared)
    return Masks(seed, flat.extents).draw(torch.zeros(1, flat.shape[1], WIDTH), rate, place, **of)


def factors(mask: Mask) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = mask.factors(torch.zeros(1)).numpy()
    return found


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.1, 0.5, 0.75, 0.99])
def test_as_many_are_dropped_as_the_rate_says(rate: float) -> None:
    """Among two million; in each column, in each row and beside each other about as many as chance allows. A row's rate
    is the level below or above, 1/256 apart."""
    num_rows, width = 4000, 512
    mask = Masks(5, [(0, num_rows)]).draw(torch.zeros(num_rows, width), rate, 1)
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
    assert mask.scale == pytest.approx(1 / (1 - rate))


def test_a_rate_above_what_a_byte_can_draw() -> None:
    mask = Masks(5, [(0, 1000)]).draw(torch.zeros(1000, 512), 0.9999, 1)
    assert factors(mask).mean() == pytest.approx(1 / 256, rel=0.2)
    assert mask.scale == pytest.approx(256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_stays_is_scaled_and_the_gradient_too(dtype: torch.dtype) -> None:
    x = (torch.rand(2, 3, 5, dtype=torch.float64) + 1).to(dtype).requires_grad_()
    masks = Masks(1, [(0, 3), (4, 3)])
    with masks.used():
        found = dropout(x, 0.4, 7)
    kept = masks.draw(x, 0.4, 7).factors(x).view(x.shape)
    assert 0 < kept.sum() < kept.numel() and found.dtype == dtype
    torch.testing.assert_close(found, x * kept / 0.6)
    slope = torch.arange(30, dtype=dtype).view(x.shape)
    found.backward(slope)
    torch.testing.assert_close(x.grad, slope * kept / 0.6)


def test_every_row_place_seed_and_expert_has_its_own() -> None:
    batch = make_batch((20, 20))
    first = factors(drawn(batch))
    np.testing.assert_array_equal(factors(drawn(batch)), first)
    rows = np.split(first, 2)
    others = [factors(drawn(batch, seed=2)), factors(drawn(batch, place=3)), factors(drawn(batch, expert=0))]
    others.append(factors(drawn(batch, expert=1)))
    for one, other in [(rows[0], rows[1]), *((first, other) for other in others), (others[-2], others[-1])]:
        assert 0.3 < (one != other).mean() < 0.55  # 2 * 0.3 * 0.7 on the whole


def test_a_row_has_the_same_mask_however_the_batch_is_cut_or_laid_out() -> None:
    batch = with_filler(shared_batch((24, 17, 20), start=9, width=28))
    whole = factors(drawn(batch, num_shared=9))
    start, *rows = np.split(whole, np.cumsum([9, 24 - 9, 17 - 9]))
    for kept in ([0], [2], [0, 2]):
        cut = factors(drawn(take(batch, np.array(kept)), num_shared=9))
        np.testing.assert_array_equal(cut, np.concatenate([start, *(rows[index] for index in kept)]))
    padded = Masks(1, as_it_is(batch).extents).draw(torch.zeros(4, 28, WIDTH), 0.3, 2)
    flat = factors(drawn(batch)).reshape(-1, WIDTH)
    in_rows = factors(padded).reshape(4, 28, WIDTH)
    np.testing.assert_array_equal(np.concatenate([in_rows[0, :24], in_rows[1, :17], in_rows[2, :20]]), flat)


def test_extents_name_the_positions() -> None:
    batch = with_filler(shared_batch((24, 17, 20), start=9, width=28))
    flat = flatten(batch, send=torch.from_numpy, num_shared=9)
    assert list(flat.extents) == [(SHARED_START, 9), (0, 15), (1, 8), (2, 11)]
    assert sum(count for _, count in flat.extents) == flat.shape[1]


def test_not_without_masks_or_with_those_of_another_layout() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(AssertionError, match="outside a training step"):
        dropout(x, 0.1, 0)
    with pytest.raises(AssertionError, match="another layout"), Masks(1, [(0, 3)]).used():
        dropout(x, 0.1, 0)
    with pytest.raises(AssertionError, match="outside a training step"):
        dropout(x, 0.1, 0)
