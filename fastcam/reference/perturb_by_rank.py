"""Reference of `fastcam.ops.perturb_by_rank`; formula and rules stand there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam.reference.mask_by_features import result_format

__all__ = ["empty_steps", "perturb_by_rank"]


def perturb_by_rank(images: Tensor, baseline: Tensor, ranks: Tensor, counts: Tensor, *, keep: bool = False) -> Tensor:
    """(B,S,C,H,W); arguments as checked by the public function."""
    reached = (ranks.unsqueeze(1) < counts.view(-1, 1, 1)).unsqueeze(2)
    there, elsewhere = (images, baseline) if keep else (baseline, images)
    chosen = torch.where(reached, there.unsqueeze(1), elsewhere.unsqueeze(1))
    return empty_steps(images, counts.shape[0]).copy_(chosen)


def empty_steps(images: Tensor, steps: int) -> Tensor:
    """(B,S,C,H,W) without values: S images for each of (B,C,H,W), each in the layout of `result_format`."""
    b, c, h, w = images.shape
    inner = (1, w * c, c) if result_format(images) is torch.channels_last else (h * w, w, 1)
    return images.new_empty_strided((b, steps, c, h, w), (steps * c * h * w, c * h * w, *inner))
