"""Triton kernel of `fastcam.ops.impute_linear`: one launch, a program for a channel of an image.

A program solves a channel's system by conjugate gradients with a multigrid cycle, from scratch memory of its own, and
goes on to the next one; steps are parted by barriers of the program, and nothing is waited for on the host.
Sums run in a fixed order, so equal inputs give equal bits. All equations are 12 times the op's, as in
`csrc/impute_linear_formulas.h`: a constant solves them without a rounding error.
"""

import torch
import triton
import triton.language as tl

from . import _launch

__all__ = ["launch"]

BLOCK = 1024  # positions a program takes at once
WARPS = 16
PROGRAMS = 264  # at once, each with its scratch: two for each of 132 multiprocessors


# A level is height x width elements in a plane with a frame of zeros: element i, in row i // width, lies at
# i + i // width + width + 2. `weights` is what an
# unknown element's own value counts in its equation, 0 for known ones.
@triton.jit
def _start(right, to, weights, height, width, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """A first solution from zeros."""
    for start in range(0, height * width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at, mask = i + i // width + width + 2, i < height * width
        weight = tl.load(weights + at, mask=mask, other=0).to(ACC)
        step = 0.8 / tl.maximum(weight, 1.0) * tl.load(right + at, mask=mask, other=0.0)
        tl.store(to + at, tl.where(weight > 0, step, 0.0), mask=mask)
    tl.debug_barrier()


@triton.jit
def _advance(right, found, to, weights, height, width, STEP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """to = found + a damped step towards the solution, or what is left of the right-hand side."""
    for start in range(0, height * width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at, mask = i + i // width + width + 2, i < height * width
        p, weight = found + at, tl.load(weights + at, mask=mask, other=0).to(ACC)
        above, below = p - (width + 1), p + (width + 1)
        corners = tl.load(above - 1, mask=mask, other=0.0) + tl.load(above + 1, mask=mask, other=0.0)
        corners += tl.load(below - 1, mask=mask, other=0.0) + tl.load(below + 1, mask=mask, other=0.0)
        vertical = tl.load(above, mask=mask, other=0.0) + tl.load(below, mask=mask, other=0.0)
        horizontal = tl.load(p - 1, mask=mask, other=0.0) + tl.load(p + 1, mask=mask, other=0.0)
        own = tl.load(p, mask=mask, other=0.0)
        value = tl.load(right + at, mask=mask, other=0.0) - weight * own
        value += (corners + 2.0 * vertical) + 2.0 * horizontal
        if STEP:
            value = own + 0.8 / tl.maximum(weight, 1.0) * value
        tl.store(to + at, tl.where(weight > 0, value, 0.0), mask=mask)
    tl.debug_barrier()


@triton.jit
def _restrict(rest, right, weights, height, width, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The right-hand side of a level of height x width from the residual of the finer one."""
    for start in range(0, height * width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at, mask = i + i // width + width + 2, i < height * width
        p = rest + 2 * (i // width) * (2 * width + 1) + 2 * (i % width)  # from the row above and the column before on
        found = tl.zeros_like(tl.load(p, mask=mask, other=0.0))
        for j in tl.static_range(4):
            row = p + j * (2 * width + 1)
            ends = tl.load(row, mask=mask, other=0.0) + tl.load(row + 3, mask=mask, other=0.0)
            middle = tl.load(row + 1, mask=mask, other=0.0) + tl.load(row + 2, mask=mask, other=0.0)
            found += (ends + 3.0 * middle) * (0.1875 if j == 1 or j == 2 else 0.0625)
        unknown = tl.load(weights + at, mask=mask, other=0) > 0
        tl.store(right + at, tl.where(unknown, found, 0.0), mask=mask)
    tl.debug_barrier()


@triton.jit
def _prolong(coarse, found, weights, height, width, BLOCK: tl.constexpr):
    """What the next coarser level has found, added to a level of height x width."""
    stride = width // 2 + 1
    for start in range(0, height * width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        y, x = i // width, i % width
        at, mask = i + y + width + 2, i < height * width
        near = coarse + (y // 2 + 1) * stride + 1 + x // 2
        down, right = tl.where(y % 2 == 1, stride, -stride), tl.where(x % 2 == 1, 1, -1)
        own = 3.0 * tl.load(near, mask=mask, other=0.0) + tl.load(near + down, mask=mask, other=0.0)
        beside = 3.0 * tl.load(near + right, mask=mask, other=0.0) + tl.load(near + down + right, mask=mask, other=0.0)
        unknown = tl.load(weights + at, mask=mask, other=0) > 0
        added = tl.where(unknown, (3.0 * own + beside) * 0.0625, 0.0)
        tl.store(found + at, tl.load(found + at, mask=mask, other=0.0) + added, mask=mask)
    tl.debug_barrier()


@triton.jit
def _mark(weights, unknown, y, x, at, mask, height, width):
    """The weights of an element's neighbours within height x width, sides counted twice; 1 without any; 0 if known."""
    vertical = (y > 0).to(tl.int32) + (y + 1 < height).to(tl.int32)
    horizontal = (x > 0).to(tl.int32) + (x + 1 < width).to(tl.int32)
    weight = tl.maximum(2 * (vertical + horizontal) + vertical * horizontal, 1)
    tl.store(weights + at, tl.where(unknown, weight, 0).to(tl.int8), mask=mask)


@triton.jit
def _impute(
    images, missing, out, scratch, weights, systems, channels, height, width, top_height, top_width, depth, pyramid,
    iterations, least, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    plane, pixels = (top_height + 2) * (top_width + 1) + 1, height * width
    size = 4 * tl.cast(pyramid, tl.int64) + 3 * plane
    program = tl.program_id(0).to(tl.int64)
    right = scratch + program * size
    found, other, rest = right + pyramid, right + 2 * pyramid, right + 3 * pyramid
    solution = right + 4 * pyramid
    step, zeros = solution + plane, solution + 2 * plane
    weights += program * pyramid
    for first in range(0, size, BLOCK):  # of these zeros frames stay
        element = first + tl.arange(0, BLOCK)
        tl.store(right + element, tl.zeros((BLOCK,), ACC), mask=element < size)
    for system in range(program, systems, tl.num_programs(0)):
        values = images + tl.cast(system, tl.int64) * pixels
        hole = missing + tl.cast(system // channels, tl.int64) * pixels
        tl.debug_barrier()

        # Which elements are unknown: those of a coarse level whose four all are, or lie beyond the image.
        for start in range(0, top_height * top_width, BLOCK):
            i = start + tl.arange(0, BLOCK)
            y, x, mask = i // top_width, i % top_width, i < top_height * top_width
            inside = mask & (y < height) & (x < width)
            unknown = tl.load(hole + y * width + x, mask=inside, other=0) != 0
            _mark(weights, unknown, y, x, i + y + top_width + 2, mask, height, width)
        tl.debug_barrier()
        h, w, offset = top_height, top_width, 0
        for level in range(depth):
            high, wide = (height + (1 << level) - 1) >> level, (width + (1 << level) - 1) >> level
            finer, stride = weights + offset, w + 1
            offset += (h + 2) * (w + 1) + 1
            h, w = h // 2, w // 2
            for start in range(0, h * w, BLOCK):
                i = start + tl.arange(0, BLOCK)
                y, x, mask = i // w, i % w, i < h * w
                unknown = mask & (y < (high + 1) // 2) & (x < (wide + 1) // 2)
                for j in tl.static_range(4):
                    fy, fx = 2 * y + j // 2, 2 * x + j % 2
                    inside = mask & (fy < high) & (fx < wide)
                    unknown = unknown & (tl.load(finer + (fy + 1) * stride + 1 + fx, mask=inside, other=1) > 0)
                _mark(weights + offset, unknown, y, x, i + y + w + 2, mask, (high + 1) // 2, (wide + 1) // 2)
            tl.debug_barrier()
        coarsest = offset

        # The known neighbours' part of the equations.
        poison = tl.zeros((BLOCK,), ACC)
        for start in range(0, top_height * top_width, BLOCK):
            i = start + tl.arange(0, BLOCK)
            y, x, mask = i // top_width, i % top_width, i < top_height * top_width
            at, total = i + y + top_width + 2, tl.zeros((BLOCK,), ACC)
            for j in range(9):
                dy, dx = j // 3 - 1, j % 3 - 1
                ny, nx = y + dy, x + dx
                inside = mask & (ny >= 0) & (nx >= 0) & (ny < height) & (nx < width)
                known = inside & (tl.load(weights + (ny + 1) * (top_width + 1) + 1 + nx, mask=inside, other=1) == 0)
                value = tl.load(values + ny * width + nx, mask=known, other=0.0).to(ACC)
                poison += value - value  # NaN for a known pixel that is not finite
                total += (3 - dy * dy - dx * dx) * value  # the element itself: not known where the total is used
            unknown = tl.load(weights + at, mask=mask, other=0) > 0
            tl.store(right + at, tl.where(unknown, total, 0.0), mask=mask)
            tl.store(solution + at, tl.zeros_like(total), mask=mask)
            tl.store(step + at, tl.zeros_like(total), mask=mask)
        tl.debug_barrier()

        flaw = tl.sum(poison)
        active = flaw == 0
        energy = tl.cast(0.0, tl.float64)
        target = energy
        turn = 0
        while (turn < iterations) & active:
            # An approximate solution of the equations for what is left of their right-hand sides.
            h, w, offset = top_height, top_width, 0
            for _ in range(depth):
                r, f, o, e, g = right + offset, found + offset, other + offset, rest + offset, weights + offset
                _start(r, o, g, h, w, ACC, BLOCK)
                _advance(r, o, f, g, h, w, True, ACC, BLOCK)
                _advance(r, f, e, g, h, w, False, ACC, BLOCK)
                offset += (h + 2) * (w + 1) + 1
                h, w = h // 2, w // 2
                _restrict(e, right + offset, weights + offset, h, w, ACC, BLOCK)
            r, f, o, g = right + coarsest, found + coarsest, other + coarsest, weights + coarsest
            _start(r, f, g, h, w, ACC, BLOCK)
            for _ in range(4):
                _advance(r, f, o, g, h, w, True, ACC, BLOCK)
                _advance(r, o, f, g, h, w, True, ACC, BLOCK)
            offset = coarsest
            for _ in range(depth):
                coarse = found + offset
                h, w = h * 2, w * 2
                offset -= (h + 2) * (w + 1) + 1
                r, f, o, g = right + offset, found + offset, other + offset, weights + offset
                _prolong(coarse, f, g, h, w, BLOCK)
                _advance(r, f, o, g, h, w, True, ACC, BLOCK)
                _advance(r, o, f, g, h, w, True, ACC, BLOCK)

            before = energy
            energy = tl.cast(0.0, tl.float64)
            for start in range(0, h * w, BLOCK):
                i = start + tl.arange(0, BLOCK)
                at, mask = i + i // w + w + 2, i < h * w
                product = tl.load(right + at, mask=mask, other=0.0) * tl.load(found + at, mask=mask, other=0.0)
                energy += tl.sum(product.to(tl.float64))
            target = tl.where(turn == 0, energy * least, target)
            flaw = flaw + (energy - energy).to(ACC)
            active = active & (energy > target)
            ratio = tl.where(active & (turn > 0), energy / tl.where(before > 0, before, 1.0), 0.0).to(ACC)
            for start in range(0, h * w, BLOCK):
                i = start + tl.arange(0, BLOCK)
                at, mask = i + i // w + w + 2, i < h * w
                z, s = tl.load(found + at, mask=mask, other=0.0), tl.load(step + at, mask=mask, other=0.0)
                tl.store(step + at, z + ratio * s, mask=mask)
            tl.debug_barrier()
            _advance(zeros, step, rest, weights, h, w, False, ACC, BLOCK)  # minus the equations' left sides
            curvature = tl.cast(0.0, tl.float64)
            for start in range(0, h * w, BLOCK):
                i = start + tl.arange(0, BLOCK)
                at, mask = i + i // w + w + 2, i < h * w
                product = tl.load(step + at, mask=mask, other=0.0) * tl.load(rest + at, mask=mask, other=0.0)
                curvature -= tl.sum(product.to(tl.float64))
            active = active & (curvature > 0)
            length = tl.where(active, energy / tl.where(active, curvature, 1.0), 0.0).to(ACC)
            for start in range(0, h * w, BLOCK):
                i = start + tl.arange(0, BLOCK)
                at, mask = i + i // w + w + 2, i < h * w
                s, turned = tl.load(step + at, mask=mask, other=0.0), tl.load(rest + at, mask=mask, other=0.0)
                so_far, left = tl.load(solution + at, mask=mask, other=0.0), tl.load(right + at, mask=mask, other=0.0)
                tl.store(solution + at, tl.where(active, so_far + length * s, so_far), mask=mask)
                tl.store(right + at, tl.where(active, left + length * turned, left), mask=mask)
            tl.debug_barrier()
            turn += 1

        for start in range(0, pixels, BLOCK):
            i = start + tl.arange(0, BLOCK)
            mask = i < pixels
            at = (i // width + 1) * (top_width + 1) + 1 + i % width
            imputed = tl.where(flaw == 0, tl.load(solution + at, mask=mask, other=0.0), float("nan"))
            known = tl.load(hole + i, mask=mask, other=0) == 0
            kept = tl.load(values + i, mask=mask, other=0.0)
            result = tl.where(known, kept, imputed.to(kept.dtype))
            tl.store(out + tl.cast(system, tl.int64) * pixels + i, result, mask=mask)


def launch(images: torch.Tensor, missing: torch.Tensor, iterations: int = 12) -> torch.Tensor:
    """Arguments and result of `fastcam.ops.impute_linear`. One launch."""
    with _launch.on_device(images, missing):
        batch, channels, height, width = images.shape
        out = torch.empty(images.shape, dtype=images.dtype, device=images.device)
        if not batch:
            return out
        depth = max(0, (min(height, width) - 1).bit_length() - 3)
        top_height, top_width = (-(-n >> depth) << depth for n in (height, width))
        framed = [((top_height >> level) + 2) * ((top_width >> level) + 1) + 1 for level in range(depth + 1)]
        if sum(framed) >= 2**31:
            raise ValueError(
                f"impute_linear: one image must have fewer than 3/4 2^31 pixels, got {tuple(images.shape)}"
            )
        systems = batch * channels
        programs = min(systems, PROGRAMS)
        acc = _launch.accumulation(images.dtype)
        scratch = torch.empty(programs * (4 * sum(framed) + 3 * framed[0]), dtype=acc, device=images.device)
        weights = torch.empty(programs * sum(framed), dtype=torch.int8, device=images.device)
        _impute[(programs,)](
            images.contiguous(), missing.contiguous().view(torch.int8), out, scratch, weights, systems, channels,
            height, width, top_height, top_width, depth, sum(framed), iterations,
            1e-34 if acc == torch.float64 else 1e-18,
            ACC=_launch.triton_type(acc), BLOCK=BLOCK, num_warps=WARPS, num_stages=1,
        )  # fmt: skip
        return out
