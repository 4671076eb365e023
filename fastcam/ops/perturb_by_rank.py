"""`perturb_by_rank`: images whose most relevant pixels are replaced, one image a step of insertion or deletion."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import reference as references
from fastcam.backends import plain_call
from fastcam.ops import _checks
from fastcam.ops._plain import register_plain, run
from fastcam.reference.perturb_by_rank import empty_steps

__all__ = ["perturb_by_rank"]


def perturb_by_rank(images: Tensor, baseline: Tensor, ranks: Tensor, counts: Tensor, *, keep: bool = False) -> Tensor:
    """Every image at every step of a perturbation: the pixels of the lowest ranks are taken from a baseline.

    Formula: result[b,s,:,p] = baseline[b,:,p] where ranks[b,p] < counts[s], else images[b,:,p]: deletion.
        With keep=True the other way round, images[b,:,p] where ranks[b,p] < counts[s], else baseline[b,:,p]: insertion.
    Values are copied bit for bit, NaN too. Ranks need not be a permutation: equal ones are replaced together. Counts
    may be in any order and of any size; below the lowest rank nothing is replaced, above the highest everything.
    Shapes: images (B,C,H,W); baseline (1|B,C,1|H,1|W), one of batch 1 serves every image, one row or column every row
    or column; ranks (B,H,W); counts (S,). Returns (B,S,C,H,W). B and S may be 0.
    Dtype and layout: images and baseline float64, float32, float16 or bfloat16, both alike; ranks int32 or int64,
    counts int64; any strides. The result has the images' dtype. Its images lie one after the other, (B,S) in order,
    each channels_last where the images are (and not also contiguous), else contiguous: flatten(0, 1) of it is a view
    that networks take as it is.
    Not differentiable. Errors: TypeError for a wrong type, layout or dtype, ValueError for wrong shapes or devices and
    C or H W = 0, RuntimeError for inputs that require grad.
    Cost: images, baseline and ranks read once from memory, the result written once. No host synchronisation. Tensors
    that are not dense are copied once, as is a baseline of one row or one column only.
    Source: Petsiuk et al. 2018 (RISE), insertion and deletion; Samek et al. 2017, most relevant first.
    """
    found = plain_call("perturb_by_rank", images, baseline, ranks, counts, keep)
    if found is not NotImplemented:
        return found
    _check(images, baseline, ranks, counts, keep=keep)
    return run("perturb_by_rank", images, baseline, ranks, counts, keep=keep)


def _check(images: Tensor, baseline: Tensor, ranks: Tensor, counts: Tensor, *, keep: bool = False) -> None:
    op = "perturb_by_rank"
    _checks.check_features(op, images, "images", "(B,C,H,W)")
    _checks.check_companion(op, "baseline", baseline, images, or_accumulation=False, of="images")
    b, c, h, w = images.shape
    found = baseline.shape
    fits = len(found) == 4 and found[0] in (1, b) and found[1] == c and found[2] in (1, h) and found[3] in (1, w)
    if not fits:
        raise ValueError(f"{op}: baseline must be (1 or {b}, {c}, 1 or {h}, 1 or {w}), got {tuple(baseline.shape)}")
    _check_integers(op, "ranks", ranks, images, (torch.int32, torch.int64))
    if ranks.shape != (b, h, w):
        raise ValueError(f"{op}: ranks must be {(b, h, w)}, got {tuple(ranks.shape)}")
    _check_integers(op, "counts", counts, images, (torch.int64,))
    if counts.dim() != 1:
        raise ValueError(f"{op}: counts must be (S,), got {counts.dim()} dimensions: {tuple(counts.shape)}")
    if not isinstance(keep, bool):
        raise TypeError(f"{op}: keep must be a bool, got {keep!r}")
    _checks.check_no_grad(op, images, baseline)


def _check_integers(op: str, name: str, value: Tensor, images: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _checks.check_tensor(op, name, value)
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {wanted}, got {value.dtype}; convert with .long()")
    if not _checks.same_device(value, images):
        raise ValueError(f"{op}: {name} is on {value.device}, images on {images.device}; both must be on one device")


def _fake(images: Tensor, baseline: Tensor, ranks: Tensor, counts: Tensor, *, keep: bool = False) -> Tensor:
    return empty_steps(images, counts.shape[0])


register_plain("perturb_by_rank", references.perturb_by_rank, _fake, _check)
