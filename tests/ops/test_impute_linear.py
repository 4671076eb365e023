"""`impute_linear` against the dense float64 solution of its linear system."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from fastcam import ops
from fastcam._testing.ops import DTYPES, LAYOUTS, make, to_float64

OP = torch.ops.fastcam.impute_linear.default
#: Largest error over the values' range, after 20 iterations: rounding in the accumulation dtype, which a hole that leaves
#: a single pixel multiplies by some hundreds.
LIMIT = {torch.float64: 1e-10, torch.float32: 4e-5}


def oracle(images: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Every missing pixel the weighted mean of its neighbours; 0 where nothing is known."""
    found = images.copy()
    _, height, width = missing.shape
    for image, hole in zip(found, missing, strict=True):
        if hole.all():
            image[:] = 0
        if hole.all() or not hole.any():
            continue
        matrix, right = np.eye(height * width), image.reshape(len(image), -1).T.copy()
        for y, x in np.argwhere(hole):
            row = matrix[y * width + x]
            right[y * width + x] = 0
            for dy, dx in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
                if 0 <= y + dy < height and 0 <= x + dx < width:
                    row[(y + dy) * width + x + dx] = -(1 / 12 if dy and dx else 1 / 6)
            row[y * width + x] = 0
            row[y * width + x] = -row.sum()
        image[:] = np.linalg.solve(matrix, right).T.reshape(image.shape)
    return found


def holes(count: int, height: int, width: int, seed: int) -> torch.Tensor:
    """Scattered pixels, blobs, nearly everything, nothing and everything, in turn."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    kinds = (
        lambda: rng.random((height, width)) < 0.5,
        lambda: (y - rng.integers(height)) ** 2 + (x - rng.integers(width)) ** 2 < (height * width) / 6,
        lambda: (y != rng.integers(height)) | (x != rng.integers(width)),
        lambda: np.zeros((height, width), bool),
        lambda: np.ones((height, width), bool),
    )
    return torch.from_numpy(np.stack([kinds[(i + seed) % len(kinds)]() for i in range(count)]))


def check(images: torch.Tensor, missing: torch.Tensor, iterations: int = 20) -> None:
    got = ops.impute_linear(images, missing, iterations)
    assert got.dtype == images.dtype
    assert got.is_contiguous()
    known = ~missing.unsqueeze(1).expand_as(images)
    assert torch.equal(got[known], images[known])
    wide = torch.promote_types(images.dtype, torch.float32)
    want = oracle(to_float64(images), missing.numpy())
    scale = max(1.0, float(np.abs(want).max())) if want.size else 1.0
    rounding = 0 if images.dtype == wide else torch.finfo(images.dtype).eps
    assert np.abs(to_float64(got) - want).max(initial=0) <= (LIMIT[wide] + rounding) * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(backend, layout, dtype):
    missing = holes(5, 13, 18, 0)
    check(make((5, 3, 13, 18), dtype, 1, layout), missing)
    check(make((5, 3, 13, 18), dtype, 1, layout), missing.transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (8, 8), (9, 9), (16, 31), (33, 24), (17, 40)], ids=str)
def test_sizes(backend, shape):
    check(make((6, 2, *shape), torch.float64, 2), holes(6, *shape, 1))
    check(make((6, 2, *shape), torch.float32, 2), holes(6, *shape, 2))


def fuzz_case(seed: int) -> None:
    """One random call; a failure is repeated with fuzz_case(seed)."""
    rng = random.Random(seed)
    size = rng.randint(1, 26), rng.randint(1, 26)
    batch, channels = rng.randint(0, 4), rng.randint(1, 4)
    images = make((batch, channels, *size), rng.choice(DTYPES), seed, rng.choice(list(LAYOUTS)))
    check(images, holes(max(batch, 1), *size, seed)[:batch])


@pytest.mark.parametrize("seed", range(6))
def test_fuzz(backend, seed):
    for offset in range(8):
        fuzz_case(100 * seed + offset)


def test_twelve_iterations_fill_a_hole_of_a_photograph_s_size(backend):
    """A smooth function of the known pixels: harmonic ones are reproduced, to the accuracy that is promised."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 224), torch.linspace(-1, 1, 224), indexing="ij")
    image = torch.stack([x + 2 * y, x * y, x * x - y * y]).unsqueeze(0)
    missing = (x.square() + y.square() < 0.9).unsqueeze(0)  # 71 % of the image
    got = ops.impute_linear(image.where(~missing.unsqueeze(1), torch.tensor(math.nan)), missing)
    assert (got - image).abs().max() < 2e-3 * 2  # of the range; the third is harmonic to the grid's accuracy only
    assert (got - image)[:, :2].abs().max() < 2e-3
    better = ops.impute_linear(image, missing, 30)
    assert (better - image)[:, :2].abs().max() < 1e-5


def test_images_and_channels_do_not_touch_each_other(backend):
    images, missing = make((4, 3, 20, 23), torch.float32, 3), holes(4, 20, 23, 0)
    whole = ops.impute_linear(images, missing)
    assert torch.equal(ops.impute_linear(images[1:2], missing[1:2]), whole[1:2])
    assert torch.equal(ops.impute_linear(images[:, 1:2], missing), whole[:, 1:2])
    assert torch.equal(ops.impute_linear(images, missing), whole)
    broken = images.clone()
    broken[0, 1] = math.nan
    got = ops.impute_linear(broken, missing)
    assert torch.equal(got[:, [0, 2]], whole[:, [0, 2]])
    assert torch.equal(got[1:], whole[1:])
    assert got[0, 1].isnan().all()


def test_threads_change_nothing():
    images, missing = make((5, 3, 40, 33), torch.float32, 4), holes(5, 40, 33, 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.impute_linear(images, missing)
        torch.set_num_threads(4)
        assert torch.equal(ops.impute_linear(images, missing), one)
    finally:
        torch.set_num_threads(threads)


def test_opcheck():
    torch.library.opcheck(OP, (make((2, 3, 9, 8), torch.float32, 0), holes(2, 9, 8, 0)))
    torch.library.opcheck(OP, (make((2, 3, 9, 8), torch.float64, 0, "channels_last"), holes(2, 9, 8, 0), 3))


@pytest.mark.parametrize("call", [ops.impute_linear, OP])
def test_errors(backend, call):
    images, missing = torch.rand(2, 3, 6, 7), torch.zeros(2, 6, 7, dtype=torch.bool)
    with pytest.raises(TypeError, match="missing must be bool"):
        call(images, missing.float())
    with pytest.raises(ValueError, match="missing must"):
        call(images, missing[:1])
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        call(images, missing, 0)
    with pytest.raises(TypeError, match=r"images .*int64|images must be float64"):
        call(images.long(), missing)
    with pytest.raises(ValueError, match=r"images must be \(N,C,H,W\)"):
        call(images[0], missing)
    with pytest.raises(RuntimeError, match="not differentiable"):
        call(images.requires_grad_(), missing)
