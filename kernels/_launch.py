"""What every Triton launcher needs around its kernels: where it may run, how tensors lie in memory, result types."""

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

__all__ = [
    "accumulation", "dense_images", "images_as", "in_order_of", "in_sequence", "is_channels_last", "memory_format",
    "next_power_of_2", "on_device", "runs", "tile_offset", "triton_type",
]  # fmt: skip

# Triton reads TRITON_INTERPRET when it decorates a kernel, so the answer is fixed for the life of this process.
INTERPRETED = triton.knobs.runtime.interpret

SHORT_RUN = 256  # elements; an expanded reference costs less than starting over so often

_TRITON_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

next_power_of_2 = triton.next_power_of_2


def on_device(*tensors: torch.Tensor | None) -> contextlib.AbstractContextManager:
    """Context in which kernels launch on the tensors' device and that device's current stream.

    Errors: RuntimeError for tensors on several devices, and for tensors that are not on a CUDA device unless the
    process runs Triton's interpreter.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        raise RuntimeError(f"all tensors must be on one device, got {sorted(map(str, devices))}")
    device = devices.pop()
    if device.type == "cuda" and not INTERPRETED:
        return torch.cuda.device(device)
    if device.type == "cpu" and INTERPRETED:
        return contextlib.nullcontext()
    if INTERPRETED:
        raise RuntimeError(f"TRITON_INTERPRET=1 runs Triton kernels on CPU tensors, got tensors on {device}")
    raise RuntimeError(
        f"Triton kernels run on CUDA tensors, got tensors on {device}; move them to a GPU, choose another backend, or "
        "set TRITON_INTERPRET=1 before Python starts to interpret the kernels on the CPU"
    )


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the type sums are formed in and results are returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of an accumulation type."""
    return _TRITON_TYPES[dtype]


def is_channels_last(images: torch.Tensor) -> bool:
    """True for channels_last images; any layout that is neither counts as NCHW."""
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """channels_last (in two or three dimensions) where x is and is not contiguous too, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def dense_images(images: torch.Tensor, channels_last: bool | None = None) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """(N,K,H,W) images and their strides (image, channel, position), in elements.

    NCHW and channels_last are taken as they lie, or in the order asked for; any other layout costs one copy. Rows and
    columns are one index, the position i * W + j. Strides are computed from the sizes: a size-1 dimension may carry
    any stride.
    """
    _, channels, height, width = images.shape
    positions = height * width
    if is_channels_last(images) if channels_last is None else channels_last:
        return images.contiguous(memory_format=torch.channels_last), (channels * positions, 1, channels)
    return images.contiguous(), (channels * positions, positions, 1)


def tile_offset(channels: int, positions: int, tile_channels: int, tile_positions: int) -> tl.dtype:
    """int32 where every element of a tile lies within 2^31 elements of the tile's first one, in either layout."""
    span = max(tile_channels * positions + tile_positions, tile_positions * channels + tile_channels)
    return tl.int32 if span < 2**31 else tl.int64


def runs(out: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """The reference of an elementwise op, in how many runs of the non-empty dense `out` it is read, and their length.

    A reference of batch 1 is read again for every image, a run; it is expanded where images are short or not the
    outermost dimension.
    """
    batch, length = out.shape[0], out.numel() // out.shape[0]
    if reference.shape[0] == batch:
        return reference, 1, out.numel()
    if out.stride(0) == length and length >= SHORT_RUN:
        return reference, batch, length
    return reference.expand_as(out), 1, out.numel()


def in_order_of(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x in the memory order of the dense `out`, at least as large in every dimension; a copy if it lies otherwise."""
    return _with_strides(x, out.stride())


def in_sequence(out: torch.Tensor) -> torch.Tensor:
    """The non-empty dense `out` if its images lie one after the other in memory, else a contiguous stand-in."""
    batch = out.shape[0]
    if batch == 1 or out.stride(0) * batch == out.numel():
        return out
    return torch.empty_like(out, memory_format=torch.contiguous_format)


def images_as(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Any number of images in sequence, each in the memory order of those of `out`; a copy if they lie otherwise."""
    return _with_strides(x, (out.numel() // out.shape[0], *out.stride()[1:]))


def _with_strides(x: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    same = all(size == 1 or ours == theirs for size, ours, theirs in zip(x.shape, x.stride(), strides, strict=True))
    return x if same else torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
