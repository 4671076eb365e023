"""Device functions of bilinear resizing (align_corners=False, as aten's upsample_bilinear2d) and of min-max scaling.

The same arithmetic as `csrc/formulas.h`, for tiles.
"""

import triton
import triton.language as tl

__all__ = ["axis_scale", "cell_extremes", "divide", "first_output", "lerp2", "scaled", "source"]


@triton.jit
def axis_scale(size_in, size_out, ACC: tl.constexpr):
    # The float64 quotient of two small integers, rounded again to float32, is the correctly rounded float32 quotient,
    # which is what aten computes; `/` on float32 is approximate on GPUs.
    return (tl.cast(size_in, tl.float64) / tl.cast(size_out, tl.float64)).to(ACC)


@triton.jit
def source(output, scale, ACC: tl.constexpr):
    """Source coordinate of an output row or column."""
    return tl.maximum((output.to(ACC) + 0.5) * scale - 0.5, 0.0)


@triton.jit
def first_output(cell, scale, size_out, ACC: tl.constexpr):
    """First output row (column) whose source lies in source row (column) `cell` or beyond; `size_out` if none does.

    The inverse of `source` is off by at most one after rounding, so four steps from two below reach the exact answer.
    """
    output = tl.ceil((cell.to(ACC) + 0.5) / scale - 0.5).to(tl.int32) - 2
    output = tl.maximum(output, 0)
    for _ in tl.static_range(4):
        output += (source(output, scale, ACC).to(tl.int32) < cell).to(tl.int32)
    return tl.minimum(output, size_out)


@triton.jit
def lerp2(top_left, top_right, low_left, low_right, down, right):
    """Bilinear value at fractions `down` and `right`, in aten's order of operations."""
    top = (1.0 - right) * top_left + right * top_right
    low = (1.0 - right) * low_left + right * low_right
    return (1.0 - down) * top + down * low


@triton.jit
def cell_extremes(
    top_left, top_right, low_left, low_right, i, j, inside, height, width, out_height, out_width, ACC: tl.constexpr
):
    """Least and greatest resized value of each cell (i, j); infinity and -infinity where no output falls into it.

    Between two neighbouring rows and columns the resized map is affine in each coordinate, so over the outputs of a
    cell it is extreme at the first or last row and column of them.
    """
    infinity = float("inf")
    scale_y = axis_scale(height, out_height, ACC)
    scale_x = axis_scale(width, out_width, ACC)
    first_y = first_output(i, scale_y, out_height, ACC)
    last_y = first_output(i + 1, scale_y, out_height, ACC) - 1
    first_x = first_output(j, scale_x, out_width, ACC)
    last_x = first_output(j + 1, scale_x, out_width, ACC) - 1
    seen = inside & (last_y >= first_y) & (last_x >= first_x)
    y0 = source(first_y, scale_y, ACC) - i
    y1 = source(last_y, scale_y, ACC) - i
    x0 = source(first_x, scale_x, ACC) - j
    x1 = source(last_x, scale_x, ACC) - j
    a = lerp2(top_left, top_right, low_left, low_right, y0, x0)
    b = lerp2(top_left, top_right, low_left, low_right, y0, x1)
    c = lerp2(top_left, top_right, low_left, low_right, y1, x0)
    d = lerp2(top_left, top_right, low_left, low_right, y1, x1)
    least = tl.where(seen, tl.minimum(tl.minimum(a, b), tl.minimum(c, d)), infinity)
    greatest = tl.where(seen, tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), -infinity)
    return least, greatest


@triton.jit
def divide(numerator, denominator, ACC: tl.constexpr):
    # The greatest value must give exactly 1, which the approximate float32 division does not promise.
    if ACC.primitive_bitwidth == 32:
        numerator, denominator = tl.broadcast(numerator, denominator)
        quotient = tl.math.div_rn(numerator, denominator)
    else:
        quotient = numerator / denominator
    return quotient


@triton.jit
def scaled(value, least, extent, finite, ACC: tl.constexpr):
    """(value - least) / extent; 0 where the extent is 0, NaN where the map is not finite."""
    # Rounding may put a value between two corners of a cell an ulp outside them: clamp.
    value = tl.minimum(tl.maximum(divide(value - least, tl.where(extent == 0, 1.0, extent), ACC), 0.0), 1.0)
    value = tl.where(extent == 0, 0.0, value)
    return tl.where(finite > 0, value, float("nan"))
