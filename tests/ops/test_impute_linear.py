"""`impute_linear` against the dense float64 solution of its linear system."""

from __future__ import annotations

import math

import pytest
import torch

from fastcam import ops
from fastcam._testing.imputation import check_impute_linear, holes
from fastcam._testing.ops import DTYPES, LAYOUTS, make

OP = torch.ops.fastcam.impute_linear.default


def check(images: torch.Tensor, missing: torch.Tensor, iterations: int = 20) -> None:
    check_impute_linear(ops.impute_linear(images, missing, iterations), images, missing)


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
    broken[0, 1, -1, -1] = math.nan  # and known, beside no hole
    missing[0, -3:] = False
    whole = ops.impute_linear(images, missing)
    got = ops.impute_linear(broken, missing)
    assert torch.equal(got[:, [0, 2]], whole[:, [0, 2]])
    assert torch.equal(got[1:], whole[1:])
    assert got[0, 1][missing[0]].isnan().all()


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


@pytest.mark.parametrize("size", [(10, 9), (40, 33)])
def test_result_is_contiguous_whatever_comes_in_and_a_batch_may_be_empty(backend, size):
    images, missing = make((2, 3, *size), torch.float32, 1, "channels_last"), holes(2, *size, 0)
    for hole in (missing, missing.mT.contiguous().mT):
        assert ops.impute_linear(images, hole).is_contiguous()
    assert ops.impute_linear(images[:0], missing[:0]).shape == (0, 3, *size)
