"""LFI-CAM's masks and attention, forward and backward as in training, against eager and compiled PyTorch.

Baselines: `eager` is a module of plain torch ops with the same results and gradients; `compile` a warm torch.compile of
it. `copy` moves what the four ops have to read and write, and the sum of the features' two gradients. `saved_mib` is
the memory that autograd keeps for the backward pass: each storage once, as the saved-tensor hooks see it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

from fastcam import ops

DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [(32, 64, 8, 8), (32, 512, 14, 14), (32, 2048, 7, 7)]

Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class Plain(nn.Module):
    """Masks, attended features and attention, one torch op after the other."""

    def forward(self, features: Tensor, grey: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        low, high = features.amin((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
        constant = low == high
        scaled = torch.where(constant, 1.0, (features - low) / torch.where(constant, 1.0, high - low))
        masks = torch.where(features == 0, 0.0, scaled) * grey
        raw = (importance[:, :, None, None] * features).sum(1, keepdim=True).relu()
        low, high = raw.amin((2, 3), keepdim=True), raw.amax((2, 3), keepdim=True)
        constant = low == high
        attention = torch.where(constant, raw, (raw - low) / torch.where(constant, 1.0, high - low))
        return masks, (1 + attention) * features, attention


def ours(features: Tensor, grey: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
    """The same with fastcam's ops."""
    return ops.lfi_mask(features, grey), *ops.lfi_attend(features, importance)


def step(call: Call, inputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    """Results, and the gradients of features and importance."""
    found = call(*inputs)
    grads = [g.to(x.dtype) for g, x in zip(grads, found, strict=True)]
    return *(x.detach() for x in found), *torch.autograd.grad(found, [inputs[0], inputs[2]], grads)


def saved_mib(call: Call, inputs: list[Tensor]) -> float:
    """What autograd keeps for the backward pass."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = call(*inputs)
    total = sum(storages.values()) / 2**20
    del kept
    return total


def tensors(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Features after a ReLU, a grey image and importances; gradients of masks, attended features and attention."""
    torch.manual_seed(0)
    b, k, h, w = shape

    def normal(*size: int) -> Tensor:
        x = torch.randn(size, device=device).to(dtype)
        return x.contiguous(memory_format=LAYOUTS[layout]) if size == shape else x

    features, importance = normal(*shape).relu().requires_grad_(), normal(b, k).requires_grad_()
    return [features, normal(b, 1, h, w), importance], [normal(*shape), normal(*shape), normal(b, 1, h, w)]


def main() -> None:
    """Measure all rows and write the file."""
    options = harness.arguments((__doc__ or "").splitlines()[0], harness.DEVICES).parse_args()
    torch.set_num_threads(options.threads)
    plain, rows = Plain(), []
    for shape, dtype, layout in itertools.product(SHAPES, DTYPES, LAYOUTS):
        name = f"lfi {'x'.join(map(str, shape))}, {str(dtype).removeprefix('torch.')} {layout}"
        if options.only not in name:
            continue
        torch.compiler.reset()  # each shape is compiled on its own, below the recompilation limit
        compiled = torch.compile(plain, dynamic=False)
        inputs, grads = tensors(shape, dtype, layout, options.device)
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        expected = step(plain, wide, [g.double() for g in grads])
        memory = {"ours": saved_mib(ours, inputs), "eager": saved_mib(plain, inputs)}
        rows.append(
            harness.op_row(
                name,
                lambda x=inputs, g=grads: step(ours, x, g),
                {
                    "eager": lambda x=inputs, g=grads: step(plain, x, g),
                    "compile": lambda c=compiled, x=inputs, g=grads: step(c, x, g),
                },
                expected,
                (1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps)
                * max(x.abs().max() for x in expected).item(),
                13 * inputs[0].nbytes,
                options,
                op="lfi_attend",
                shape=shape,
                dtype=str(dtype),
                layout=layout,
                saved_mib=memory,
                saved_ratio=memory["eager"] / memory["ours"],
            )
        )
        print(f"    saved for backward: {memory['ours']:.1f} MiB, eager {memory['eager']:.1f} MiB", flush=True)
    harness.write("lfi", options.device, rows, options.out)


if __name__ == "__main__":
    main()
