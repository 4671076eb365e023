"""`impute_linear`: missing pixels filled in smoothly from the known ones around them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam.ops import _checks
from fastcam.ops._plain import register_plain, run

__all__ = ["impute_linear"]


def impute_linear(images: Tensor, missing: Tensor, iterations: int = 12) -> Tensor:
    """Missing pixels as weighted means of their neighbours, missing ones among them: a linear system for each channel.

    Formula: x[p] = sum_q w(p,q) x[q] / sum_q w(p,q) over the up to eight neighbours q of a missing p within the image,
        w = 1/6 for those beside, above and below, 1/12 for those across; x[q] = images[q] where q is known.
    Solved by at most `iterations` steps of conjugate gradients, preconditioned by a multigrid cycle: 12 leave errors
    around 1e-4 of the values' range or less, whatever the size of the hole; 20 leave rounding errors. Known pixels are
    copied bit for bit. Without a known pixel in an image its result is 0; NaN or infinity among the known pixels of a
    channel makes NaN of its missing ones.
    Shapes: images (N,C,H,W); missing (N,H,W) bool. Returns (N,C,H,W). N may be 0.
    Dtype and layout: images float64, float32, float16 or bfloat16, any strides; solved in float64 for float64, else in
    float32. The result has the images' dtype and is contiguous.
    Not differentiable. Images and channels do not touch each other. Errors: TypeError for a wrong type or dtype,
    ValueError for wrong shapes or devices, C or H W = 0 or iterations below 1, RuntimeError for inputs that require
    grad.
    Cost: about 100 passes over the images an iteration, from cache on CPUs; on GPUs one launch, in which a block of
    threads solves one channel after the other. No host synchronisation.
    Source: Rong et al. 2022 (ROAD), noisy linear imputation, without the noise.
    """
    _check(images, missing, iterations)
    return run("impute_linear", images, missing, iterations)


def _check(images: Tensor, missing: Tensor, iterations: int = 12) -> None:
    op = "impute_linear"
    _checks.check_features(op, images, "images", "(N,C,H,W)")
    _checks.check_tensor(op, "missing", missing)
    if missing.dtype != torch.bool:
        raise TypeError(f"{op}: missing must be bool, got {missing.dtype}")
    if missing.device != images.device:
        raise ValueError(f"{op}: missing is on {missing.device}, images on {images.device}; both must be on one device")
    wanted = images.shape[0], *images.shape[2:]
    if missing.shape != wanted:
        raise ValueError(f"{op}: missing must be {tuple(wanted)}, got {tuple(missing.shape)}")
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"{op}: iterations must be an integer, got {iterations!r}")
    if iterations < 1:
        raise ValueError(f"{op}: iterations must be at least 1, got {iterations}")
    _checks.check_no_grad(op, images)


def _fake(images: Tensor, missing: Tensor, iterations: int = 12) -> Tensor:
    return images.new_empty(images.shape)


register_plain("impute_linear", references.impute_linear, _fake, _check)
