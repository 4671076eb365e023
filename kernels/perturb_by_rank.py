"""Triton kernel of `perturb_by_rank`: every image at every step of a perturbation.

    result[b,s,:,p] = baseline[b,:,p] where ranks[b,p] < counts[s], else images[b,:,p]; with `keep` the other way round

One launch. A program takes some elements of an image, in the order they lie in memory, and writes them for STEPS steps,
so that images, baseline and ranks are read once for so many results. Elements are moved as integers of their width:
bit for bit, NaN too.
"""

import torch
import triton
import triton.language as tl

from . import _launch

__all__ = ["launch"]

BLOCK, WARPS = 1024, 4
STEPS = 8  # enough to hide the reads, few enough to fill a GPU with one image

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@triton.jit
def _perturb(
    images, baseline, ranks, counts, out,
    steps, groups, tiles, channels, pixels, baseline_image,
    KEEP: tl.constexpr, PLAIN: tl.constexpr, CHANNELS_LAST: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    group = program // tiles
    image = (group // groups).to(tl.int64)
    first = (group % groups) * STEPS
    # Elements of one image count less than 2^31; addresses are int64.
    at = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    size = channels * pixels
    inside = at < size
    if CHANNELS_LAST:
        pixel = at // channels
        channel = at % channels
    else:
        pixel = at % pixels
        channel = at // pixels
    value = tl.load(images + image * size + at, mask=inside, other=0)
    base = tl.load(baseline + image * baseline_image + (channel if PLAIN else at), mask=inside, other=0)
    rank = tl.load(ranks + image * pixels + pixel, mask=inside, other=0).to(tl.int64)
    out += (image * steps + first) * size + at
    for step in range(first, min(first + STEPS, steps)):
        reached = rank < tl.load(counts + step)
        chosen = tl.where(reached, value, base) if KEEP else tl.where(reached, base, value)
        tl.store(out, chosen, mask=inside)
        out += size


def launch(
    images: torch.Tensor, baseline: torch.Tensor, ranks: torch.Tensor, counts: torch.Tensor, *, keep: bool = False
) -> torch.Tensor:
    """Perturbed images; arguments and result as the op's schema `fastcam::perturb_by_rank`.

    Shapes: images (B,C,H,W); baseline (1|B,C,1|H,1|W); ranks (B,H,W); counts (S,). Returns (B,S,C,H,W).
    Layout, dtype: images in NCHW and channels_last are read as they lie, others are copied, and so are baselines of one
    row or column. The result's images lie one after the other, channels_last where the images are, else contiguous.
    Errors: RuntimeError for tensors this process cannot run on; ValueError for images of 2^31 elements or more and more
    than 2^31 programs. The public function has checked everything else.
    """
    b, channels, height, width = images.shape
    pixels, steps = height * width, counts.shape[0]
    size = channels * pixels
    groups, tiles = triton.cdiv(steps, STEPS), triton.cdiv(size, BLOCK)
    if size >= 2**31 or b * groups * tiles >= 2**31:
        raise ValueError(
            f"an image must have fewer than 2^31 elements, and a call fewer than 2^31 blocks, got images "
            f"{tuple(images.shape)} and {steps} steps"
        )
    with _launch.on_device(images, baseline, ranks, counts):
        channels_last = _launch.is_channels_last(images)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        shape = (b * steps, channels, height, width)
        out = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=memory_format)
        if out.numel() == 0:
            return out.view(b, steps, *images.shape[1:])
        plain = baseline.shape[2:] == (1, 1)
        if not plain:
            baseline = baseline.expand(-1, -1, height, width)
        values, base = (x.contiguous(memory_format=memory_format) for x in (images, baseline))
        word = _WORDS[images.element_size()]
        _perturb[(b * groups * tiles,)](
            values.view(word), base.view(word), ranks.contiguous(), counts.contiguous(), out.view(word),
            steps, groups, tiles, channels, pixels, 0 if base.shape[0] == 1 else base[0].numel(),
            KEEP=keep, PLAIN=plain, CHANNELS_LAST=channels_last, STEPS=STEPS, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out.unflatten(0, (b, steps))
